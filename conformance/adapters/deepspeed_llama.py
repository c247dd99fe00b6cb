"""transformers' LlamaForCausalLM, its attention made deepspeed's by `register_with_transformers`, its loss that of
transformers' Trainer, all unmodified.

The loss is gathered from the ranks, and the backward of that adds up what P ranks hand back: each has P times its
gradient, for ranks whose gradients are averaged. That is declared. Registration knows one degree of sequence
parallelism in a process, hence no replicas are claimed; and norms, rotary embedding and loss are computed in float32
at most, hence no float64. Attention alone is that of deepspeed_ulysses_hf.py, without what goes beyond its model.
"""

from types import SimpleNamespace

import deepspeed_start  # before deepspeed
import deepspeed_ulysses_hf
import torch
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import deepspeed_sp_compute_loss
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ulysses_kit


def setup(rank: ulysses_kit.Rank) -> None:
    deepspeed_ulysses_hf.setup(rank)
    # A process registers one model, and that makes the group. Here it is made, and model follows model.
    parallel_state_sp.initialize_sequence_parallel = lambda sequence_parallel_size: None


def model(weights: dict[str, torch.nn.Parameter], case: ulysses_kit.ModelCase) -> tuple[Tensor, Tensor]:
    if case.dtype == "f64":
        raise ulysses_kit.Unsupported("transformers computes in float32 what it computes widest")
    config = LlamaConfig(**case.config, attn_implementation="sdpa", use_cache=False)
    with case.input_ids.device:
        llama = LlamaForCausalLM(config).train()
    if config.tie_word_embeddings:
        weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    llama.load_state_dict(weights, assign=True)
    if case.checkpointing:
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward  # in place of what the model before has registered
    UlyssesSPAttentionHF.register_with_transformers(llama, "sdpa", case.sequence_parallel, case.batch)
    inputs = {"input_ids": case.input_ids, "position_ids": case.position_ids, "shift_labels": case.labels}
    if case.sequence_parallel == 1:
        out = llama(**inputs, labels=case.labels)
        return out.loss, out.logits
    parallelism = SimpleNamespace(sp_backend="deepspeed", sp_size=case.sequence_parallel)
    loss, out = deepspeed_sp_compute_loss(None, llama, inputs, True, parallelism)
    return loss, out.logits


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="deepspeed-llama",
        version=deepspeed_start.deepspeed.__version__,
        features=[
            *("dtype-f32", "dtype-bf16", "dtype-f16", "mask-causal"),
            *("grouped-kv", "kv-replication", "batch", "recompute", "model"),
        ],
        setup=setup,
        attention=deepspeed_ulysses_hf.attention,
        model=model,
        libraries=["deepspeed", "transformers"],
        upstream="times-ranks",
        parameters="average",
    )
