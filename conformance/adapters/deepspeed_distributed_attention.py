"""deepspeed.sequence.layer.DistributedAttention, unmodified, around PyTorch's scaled_dot_product_attention.

It claims what the class says and checks: any number of query and KV heads of at least the world size, divided
unevenly if need be. It never replicates KV heads.
"""

import deepspeed_cpu  # before deepspeed
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import ulysses_kit

GROUP = None


def core(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[B,S,h,D], all tokens of this rank's heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def setup(rank: ulysses_kit.Rank) -> None:
    global GROUP
    GROUP = deepspeed_cpu.setup(rank)


def attention(q: Tensor, k: Tensor, v: Tensor, case: ulysses_kit.Case) -> Tensor:
    layer = DistributedAttention(core, GROUP, scatter_idx=2, gather_idx=1)
    try:
        return layer(q, k, v, 0, None, case.causal)  # 0: the batch leads; None: no rotary embedding
    except AssertionError as refusal:  # how it refuses head counts, the same on every rank, before it sends
        raise ulysses_kit.Unsupported(f"DistributedAttention: {refusal}") from refusal


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="deepspeed-distributed-attention",
        version=deepspeed_cpu.deepspeed.__version__,
        features=[
            *("dtype-f64", "dtype-f32", "dtype-bf16", "dtype-f16", "mask-full", "mask-causal"),
            *("grouped-kv", "uneven-kv-heads", "uneven-query-heads", "batch"),
        ],
        setup=setup,
        attention=attention,
        libraries=["deepspeed"],
    )
