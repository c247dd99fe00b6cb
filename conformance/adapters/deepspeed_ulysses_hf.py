"""deepspeed's UlyssesSPAttentionHF, unmodified, around transformers' own sdpa_attention_forward.

It claims what the constructor checks (query heads that the world divides, KV heads that it divides or that divide it:
then it replicates them) or takes (a fixed length, the bypass outside training, the debug mode), and the arguments of
the core attention that it passes on: scale and dropout.

It gathers position ids and hands them to the core attention. That sdpa reads no documents from them is not refused
here: this is how DeepSpeed puts the two together. No mask is claimed, because that integration passes none on.
"""

from types import SimpleNamespace

import deepspeed_start  # before deepspeed
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ulysses_kit

GROUP = None
# What is fixed when one is made, and the layer with the module that calls it: it lives as long, as in a model
LAYERS: dict[tuple, tuple[UlyssesSPAttentionHF, SimpleNamespace]] = {}


def setup(rank: ulysses_kit.Rank) -> None:
    global GROUP
    GROUP = deepspeed_start.setup(rank)


def layer(case: ulysses_kit.Case) -> tuple[UlyssesSPAttentionHF, SimpleNamespace]:
    key = (case.batch, case.query_heads, case.kv_heads, case.head_size, case.layers, case.fixed_sequence)
    if key not in LAYERS:
        try:
            made = UlyssesSPAttentionHF(
                attn=sdpa_attention_forward,
                batch_size=case.batch,
                attn_head_count=case.query_heads,
                attn_head_size=case.head_size,
                kv_head_count=case.kv_heads,
                num_hidden_layers=1 if case.layers is None else case.layers,
                process_group=GROUP,
                seq_length_is_variable=case.fixed_sequence is None,
                local_seq_length=case.fixed_sequence and case.fixed_sequence // case.world,
                global_seq_length=case.fixed_sequence,
                disable_in_eval=True,  # as accelerate makes it
            )
        except ValueError as refusal:
            raise ulysses_kit.Unsupported(f"UlyssesSPAttentionHF: {refusal}") from refusal
        made.skip_all_but_last_attention_debug_mode = case.layers is not None
        # what both read of a model's attention module, and what replication changes in it
        LAYERS[key] = made, SimpleNamespace(num_key_value_groups=case.query_heads // case.kv_heads)
    return LAYERS[key]


def attention(q: Tensor, k: Tensor, v: Tensor, case: ulysses_kit.Case) -> Tensor:
    ulysses, module = layer(case)
    module.training, module.is_causal = case.training, case.causal
    if case.dropout is not None:  # its random numbers are the caller's: alike on all ranks, if they seed alike
        torch.manual_seed((case.seed * case.world + case.rank) % 2**63)
    dropout = case.dropout or 0.0 if case.training else 0.0  # what models pass
    out, k, v = q, k.transpose(1, 2), v.transpose(1, 2)  # [B,H,s,D], as models call it
    for _ in range(case.layers or 1):
        out, _ = ulysses(
            module, out.transpose(1, 2), k, v, None, position_ids=case.position_ids, scaling=case.scale, dropout=dropout
        )
        out = out.reshape(*q.shape[:3], -1)  # from [B,s,Hq*D]
    return out


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="deepspeed-ulysses-hf",
        version=deepspeed_start.deepspeed.__version__,
        features=[
            *("dtype-f64", "dtype-f32", "dtype-bf16", "dtype-f16", "mask-full", "mask-causal"),
            *("grouped-kv", "kv-replication", "batch", "strided-inputs", "recompute"),
            *("scale", "dropout", "eval-bypass", "fixed-length", "skip-all-but-last"),
        ],
        setup=setup,
        attention=attention,
        libraries=["deepspeed", "transformers"],
    )
