"""Ulysses sequence parallelism in plain PyTorch: the example for implementers, and the harness' own baseline.

Every rank owns s = S/P tokens of all heads. Attention wants all tokens of some heads, so an all-to-all before it
trades heads for tokens, and one behind it trades them back. Query heads and KV heads are cut in the same order,
hence a query head meets its KV head on one rank. Not here: lengths or head counts that the ranks do not divide,
masks other than full and causal.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import ulysses_kit


class Exchange(torch.autograd.Function):
    """All-to-all over the leading dimension, [P, ...]: block r goes to rank r, block r of the result is from rank r.

    As a matrix over all ranks it is a symmetric permutation: its adjoint is the same exchange, with no scale.
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, ctx.group), None


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Attention over the tokens of all ranks: q [B,s,Hq,D], k [B,s,Hkv,D], v [B,s,Hkv,V], result [B,s,Hq,V]."""
    world = dist.get_world_size(group)
    query_heads, kv_heads = q.shape[2], k.shape[2]
    if query_heads % world != 0:
        raise ValueError(f"{query_heads} query heads do not divide over {world} ranks")
    if kv_heads % world != 0 and world % kv_heads != 0:
        raise ValueError(f"neither do {kv_heads} KV heads divide over {world} ranks, nor the ranks over the heads")
    if kv_heads < world:  # neighbouring ranks share a KV head: k0 k0 k1 k1, not k0 k1 k0 k1
        k, v = (x.repeat_interleave(world // kv_heads, dim=2) for x in (k, v))

    # [B,s,H,D] -> [B,s,P,H/P*D]: block p of each holds the heads of rank p, so one exchange serves all three
    by_rank = [x.unflatten(2, (world, -1)).flatten(3) for x in (q, k, v)]
    received = Exchange.apply(torch.cat(by_rank, dim=3).movedim(2, 0), group)  # [P,B,s,n], P by source
    whole = received.movedim(0, 1).flatten(1, 2)  # [B,S,n]: ranks own their tokens in rank order
    parts = whole.split([x.shape[3] for x in by_rank], dim=2)
    q, k, v = (part.unflatten(2, (-1, x.shape[3])).transpose(1, 2) for part, x in zip(parts, (q, k, v)))
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)  # [B,Hq/P,S,V]

    by_rank = out.transpose(1, 2).unflatten(1, (world, -1))  # [B,P,s,Hq/P,V]
    received = Exchange.apply(by_rank.movedim(1, 0), group)  # [P,B,s,Hq/P,V]
    return received.movedim(0, 2).flatten(2, 3)


def setup(rank: ulysses_kit.Rank) -> None:
    dist.init_process_group("gloo", init_method=rank.init_method, rank=rank.rank, world_size=rank.world)


def attention(q: Tensor, k: Tensor, v: Tensor, case: ulysses_kit.Case) -> Tensor:
    if len(set(case.shard_lengths)) > 1:  # seen from the lengths of all ranks: refused by all, before any waits
        raise ulysses_kit.Unsupported(f"shards of unequal lengths {case.shard_lengths}")
    if case.documents:  # it reads no position ids, and would have tokens attend across documents without a word
        raise ulysses_kit.Unsupported("packed documents")
    try:
        return ulysses_attention(q, k, v, case.causal, case.scale)
    except ValueError as refusal:
        raise ulysses_kit.Unsupported(str(refusal)) from refusal


FEATURES = [
    *("dtype-f64", "dtype-f32", "dtype-bf16", "dtype-f16", "mask-full", "mask-causal"),
    *("grouped-kv", "kv-replication", "batch", "value-head-size", "strided-inputs", "recompute", "scale"),
]

if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="torch-plain", version="1", features=FEATURES, setup=setup, attention=attention
    )
