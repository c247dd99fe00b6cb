"""deepspeed.sequence.layer.DistributedAttention, unmodified, around PyTorch's scaled_dot_product_attention.

It claims what the class says and checks: any number of query and KV heads of at least the world size, divided
unevenly if need be, and rotary embedding. It never replicates KV heads. Beyond that, it hands what its caller passes on
to the core attention, which has all tokens of whole heads in their order: scale, dropout, a mask of all tokens.

Not claimed is what the core would need and the class does not bring to it. It exchanges q, k and v alone: position ids
and padding masks of a rank's own tokens stay there. It does not say which heads a rank has: no slopes, sinks, layouts.
A softcap is not sdpa's, and norms stand outside of both.
"""

import deepspeed_start  # before deepspeed
import torch
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import ulysses_kit


def core(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    """[B,S,h,D], all tokens of this rank's heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


LAYER: DistributedAttention


def setup(rank: ulysses_kit.Rank) -> None:
    global LAYER
    LAYER = DistributedAttention(core, deepspeed_start.setup(rank), scatter_idx=2, gather_idx=1)


def attention(q: Tensor, k: Tensor, v: Tensor, case: ulysses_kit.Case) -> Tensor:
    if case.documents == "positions":
        raise ulysses_kit.Unsupported("DistributedAttention takes no position ids, and so knows of no documents")
    mask = visible(case)
    if case.dropout is not None:  # its random numbers are the caller's: alike on all ranks, if they seed alike
        torch.manual_seed((case.seed * case.world + case.rank) % 2**63)
    options = (mask, case.causal and mask is None, case.scale, case.dropout or 0.0)
    try:
        return LAYER(q, k, v, 0, rotation(case, q.dtype), *options)  # 0: the batch leads
    except AssertionError as refusal:  # how it refuses head counts, the same on every rank, before it sends
        raise ulysses_kit.Unsupported(f"DistributedAttention: {refusal}") from refusal


def visible(case: ulysses_kit.Case) -> Tensor | None:
    """Which keys a query sees, [B or 1,1,S,S]; None if the causal flag says it all."""
    if case.window is None and case.document_ends is None:
        return None
    token = torch.arange(case.sequence, device=case.position_ids.device)
    distance = token[:, None] - token
    sees = (distance >= 0 if case.causal else torch.ones_like(distance, dtype=torch.bool))[None, None]
    if case.window is not None:
        if case.window < 1:
            raise ValueError(f"window {case.window}: no query sees a key; give at least 1")
        sees = sees & (distance.abs() < case.window)
    if (ends := case.document_ends) is not None:
        if not (ends[:, -1] == case.sequence).all():
            raise ValueError(f"document ends {ends.tolist()}: the last of each row must be {case.sequence}")
        document = torch.searchsorted(ends, token.repeat(case.batch, 1), right=True)
        sees = sees & (document[:, None, :, None] == document[:, None, None, :])
    return sees


def rotation(case: ulysses_kit.Case, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of all tokens, [S,B,1,D]: the class wants them so, and the caller gathers position ids."""
    if case.rotary is None:
        return None
    shards = [torch.empty_like(case.position_ids) for _ in range(case.world)]
    torch.distributed.all_gather(shards, case.position_ids, group=LAYER.spg)
    positions = torch.cat(shards, dim=-1)[..., None]  # [B,S,1], or [3,B,S,1]
    if sections := case.rotary["sections"]:
        component = [i for i, pairs in enumerate(sections) for _ in range(pairs)]  # of each pair of channels
        positions = positions[component, ..., 0].movedim(0, -1)
    pair = torch.arange(case.head_size // 2, dtype=torch.float64, device=case.position_ids.device)
    angle = positions * case.rotary["base"] ** (-2 * pair / case.head_size)
    angle = angle.repeat(1, 1, 2).transpose(0, 1)[:, :, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="deepspeed-distributed-attention",
        version=deepspeed_start.deepspeed.__version__,
        features=[
            *("dtype-f64", "dtype-f32", "dtype-bf16", "dtype-f16", "mask-full", "mask-causal"),
            *("grouped-kv", "uneven-kv-heads", "uneven-query-heads", "batch"),
            *("value-head-size", "strided-inputs", "recompute"),
            *("scale", "rotary", "mrope", "dropout", "sliding-window", "documents-by-ends"),
        ],
        setup=setup,
        attention=attention,
        libraries=["deepspeed"],
    )
