"""A decoder of the Llama family in plain PyTorch, around the attention of torch_plain.py.

Nothing in it but attention and loss knows of other ranks: a token meets the others in attention alone, and is at its
position in the whole sequence because that is what position ids say. A replica's ranks attend among themselves; the
loss is that of all replicas. Not here, as there: lengths or heads that the ranks do not divide, packed documents.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint

import torch_plain
import ulysses_kit


def model(weights: dict[str, torch.nn.Parameter], case: ulysses_kit.ModelCase) -> tuple[Tensor, Tensor]:
    if len(set(case.shard_lengths)) > 1 or case.documents:
        raise ulysses_kit.Unsupported("shards of unequal lengths, or packed documents")
    if case.config["num_attention_heads"] % case.sequence_parallel != 0:
        raise ulysses_kit.Unsupported("query heads that the ranks do not divide")
    torch_plain.refuse_together(bad_tokens(case))
    x = embedding(case.input_ids, weights["model.embed_tokens.weight"])
    run = functools.partial(checkpoint, layer, use_reentrant=False) if case.checkpointing else layer
    for number in range(case.config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        of_layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = run(x, of_layer, case)
    head = "model.embed_tokens.weight" if case.config["tie_word_embeddings"] else "lm_head.weight"
    logits = linear(norm(x, weights["model.norm.weight"], case), weights[head])
    return torch_plain.loss_over_ranks(logits, case.labels, case), logits


def layer(x: Tensor, weights: dict[str, torch.nn.Parameter], case: ulysses_kit.ModelCase) -> Tensor:
    inner = norm(x, weights["input_layernorm.weight"], case)
    query_heads, kv_heads = case.config["num_attention_heads"], case.config["num_key_value_heads"]
    q, k, v = (
        linear(inner, weights[f"self_attn.{name}_proj.weight"]).unflatten(2, (heads, case.config["head_dim"]))
        for name, heads in (("q", query_heads), ("k", kv_heads), ("v", kv_heads))
    )
    groups, _ = torch_plain.groups_of(case.data_parallel, 1, case.sequence_parallel)
    q, k = rotated(q, case), rotated(k, case)
    out = torch_plain.ulysses_attention(q, k, v, causal=True, group=groups["sequence_parallel"])
    x = x + linear(out.flatten(2), weights["self_attn.o_proj.weight"])
    inner = norm(x, weights["post_attention_layernorm.weight"], case)
    gate = silu(linear(inner, weights["mlp.gate_proj.weight"]))
    return x + linear(gate * linear(inner, weights["mlp.up_proj.weight"]), weights["mlp.down_proj.weight"])


def norm(x: Tensor, weight: Tensor, case: ulysses_kit.ModelCase) -> Tensor:
    return rms_norm(x, weight.shape, weight, case.config["rms_norm_eps"])


def rotated(x: Tensor, case: ulysses_kit.ModelCase) -> Tensor:
    """Channels c and c + D/2 of each head, turned by position * theta^(-2c/D), in float32 at least."""
    wide, size = case.dloss.dtype, x.shape[3]
    speeds = case.config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=wide, device=x.device) / size)
    angles = (case.position_ids[..., None] * speeds)[:, :, None]  # [B,s,1,D/2]
    a, b = x.to(wide).chunk(2, dim=3)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=3).to(x.dtype)


def bad_tokens(case: ulysses_kit.ModelCase) -> str | None:
    """What is wrong with this rank's tokens, which other ranks cannot see."""
    ids, labels, vocabulary = case.input_ids, case.labels, case.config["vocab_size"]
    if case.position_ids.shape != ids.shape or labels.shape != ids.shape:
        return f"position ids {list(case.position_ids.shape)} and labels {list(labels.shape)} of ids {list(ids.shape)}"
    labels = labels[labels != case.ignore_index]
    if wrong := [x for x in torch.cat((ids.flatten(), labels)).tolist() if not 0 <= x < vocabulary]:
        return f"{wrong[0]} is none of {vocabulary} tokens"
    return None


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="torch-plain-llama",
        version="1",
        features=[
            *("dtype-f64", "dtype-f32", "dtype-bf16", "dtype-f16", "mask-causal"),
            *("grouped-kv", "kv-replication", "batch", "recompute", *ulysses_kit.REQUESTS["model"]),
        ],
        setup=torch_plain.setup,
        attention=torch_plain.attention,
        model=model,
    )
