"""deepspeed's UlyssesSPAttentionHF, unmodified, around transformers' own sdpa_attention_forward.

It claims what the constructor checks: query heads that the world divides, and KV heads that it divides or that
divide it (then it replicates them).
"""

from types import SimpleNamespace

import deepspeed_cpu  # before deepspeed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ulysses_kit

GROUP = None
LAYERS: dict[tuple, UlyssesSPAttentionHF] = {}  # batch, heads and head size are fixed when one is made


def setup(rank: ulysses_kit.Rank) -> None:
    global GROUP
    GROUP = deepspeed_cpu.setup(rank)


def layer(case: ulysses_kit.Case) -> UlyssesSPAttentionHF:
    shape = (case.batch, case.query_heads, case.kv_heads, case.head_size)
    if shape not in LAYERS:
        try:
            LAYERS[shape] = UlyssesSPAttentionHF(
                attn=sdpa_attention_forward,
                batch_size=case.batch,
                attn_head_count=case.query_heads,
                attn_head_size=case.head_size,
                kv_head_count=case.kv_heads,
                num_hidden_layers=1,
                process_group=GROUP,
                seq_length_is_variable=True,
            )
        except ValueError as refusal:
            raise ulysses_kit.Unsupported(f"UlyssesSPAttentionHF: {refusal}") from refusal
    return LAYERS[shape]


def attention(q: Tensor, k: Tensor, v: Tensor, case: ulysses_kit.Case) -> Tensor:
    # what both classes read of a model's attention module; replication changes num_key_value_groups in it
    module = SimpleNamespace(
        training=True, is_causal=case.causal, num_key_value_groups=case.query_heads // case.kv_heads
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B,H,s,D], as models call it
    out, _ = layer(case)(module, q, k, v, None, position_ids=case.position_ids)
    return out.unflatten(-1, (case.query_heads, case.head_size))  # from [B,s,Hq*D]


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="deepspeed-ulysses-hf",
        version=deepspeed_cpu.deepspeed.__version__,
        features=[
            *("dtype-f64", "dtype-f32", "dtype-bf16", "dtype-f16", "mask-full", "mask-causal"),
            *("grouped-kv", "kv-replication", "batch"),
        ],
        setup=setup,
        attention=attention,
        libraries=["deepspeed", "transformers"],
    )
