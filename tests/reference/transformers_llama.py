"""What Hugging Face transformers says a tiny decoder's logits, loss and gradients are.

usage: transformers_llama.py FOLDER

For each case: FOLDER/<case>/model as `save_pretrained` writes it, and
FOLDER/<case>/expected.safetensors with the tokens, the logits, the loss and the
gradient of every weight under its name. Everything is float64.

transformers computes norms, angles, the softmax and the loss in float32 whatever
the model is in. `Float64` makes float64 of these without another change to its code,
so that what is left to compare is 1e-16 and not 1e-7. The case `as_it_comes` is
without.
"""

import copy
import json
import os
import sys

import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaAttention

TOKENS = 13
VOCABULARY = 40
IGNORED = -100


class Float64(TorchFunctionMode):
    """float64 wherever float32 is asked for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wider(x):
            return torch.float64 if x is torch.float32 else x

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(wider(x) for x in args)
        return function(*args, **{key: wider(x) for key, x in (kwargs or {}).items()})


BASE = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
CASES = {
    "gqa": LlamaConfig(**BASE),
    "as_it_comes": LlamaConfig(**BASE),
    "tied": LlamaConfig(
        **BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, pad_token_id=7, rms_norm_eps=1e-3
    ),
    "mqa": LlamaConfig(
        **{**BASE, "num_key_value_heads": 1, "rope_parameters": LLAMA3, "head_dim": 10, "num_hidden_layers": 2}
    ),
    "packed": LlamaConfig(**BASE),
    "mixed": LlamaConfig(**BASE, head_dim=6),
    "window": MistralConfig(**BASE, sliding_window=4),
}
# For each row of the batch the lengths of its documents.
DOCUMENTS = {"packed": [[5, 1, 7], [6, 7]]}
# Query and KV heads of each layer where they differ.
HEADS = {"mixed": [(4, 2), (12, 4), (8, 8)]}


def build(name, config, generator):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    for index, (query, kv) in enumerate(HEADS.get(name, [])):
        of_layer = copy.deepcopy(config)
        of_layer.num_attention_heads, of_layer.num_key_value_heads = query, kv
        model.model.layers[index].self_attn = LlamaAttention(of_layer, index).double()
    model.tie_weights()
    # Large enough that no gradient is nearly zero, and no norm or bias idle.
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "norm" in key:
            parameter.data = 1 + 0.3 * noise
        elif key.endswith("bias"):
            parameter.data = 0.2 * noise
        else:
            parameter.data = noise / parameter.shape[1] ** 0.5
    model.tie_weights()
    return model


def save(name, model, folder):
    # In several files, with an index, where there is no reason for one.
    model.save_pretrained(folder, max_shard_size="6KB" if name == "gqa" else "1GB")
    if name in HEADS:
        path = os.path.join(folder, "config.json")
        with open(path) as file:
            config = json.load(file)
        config["num_attention_heads"] = [query for query, _ in HEADS[name]]
        config["num_key_value_heads"] = [kv for _, kv in HEADS[name]]
        with open(path, "w") as file:
            json.dump(config, file)


def run(name, model, generator):
    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=generator)
    ids[0, 3] = 7
    labels = ids.clone()
    # Few labels in the first half, so that ranks have different numbers.
    labels[:, 2:6] = IGNORED
    rows = DOCUMENTS.get(name, [[TOKENS]] * 2)
    # The label of a document's first token is nobody's.
    counted = sum(
        int((labels[row, end - length + 1 : end] != IGNORED).sum())
        for row, lengths in enumerate(rows)
        for length, end in zip(lengths, torch.tensor(lengths).cumsum(0).tolist())
    )
    total, logits, positions, shifted = 0, [], [], []
    for row, lengths in enumerate(rows):
        of_row = []
        end = 0
        for length in lengths:
            begin, end = end, end + length
            part = (slice(row, row + 1), slice(begin, end))
            valid = int((labels[part][:, 1:] != IGNORED).sum())
            out = model(input_ids=ids[part], labels=labels[part] if valid else None, use_cache=False)
            if valid:
                total = total + out.loss * valid / counted
            of_row.append(out.logits)
            positions.append(torch.arange(length))
            shifted.append(torch.cat([labels[part][0, 1:], torch.tensor([IGNORED])]))
        logits.append(torch.cat(of_row, 1))
    total.backward()
    found = {
        "input_ids": ids,
        "position_ids": torch.cat(positions).view(2, TOKENS),
        "labels": torch.cat(shifted).view(2, TOKENS),
        "logits": torch.cat(logits).detach(),
        "loss": total.detach().double(),
    }
    for key, parameter in model.named_parameters():
        found["gradient." + key] = parameter.grad
    return found


def main(folder):
    torch.set_num_threads(1)
    for seed, (name, config) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        if name == "as_it_comes":
            model = build(name, config, generator)
            found = run(name, model, generator)
        else:
            with Float64():
                model = build(name, config, generator)
                found = run(name, model, generator)
        save(name, model, os.path.join(folder, name, "model"))
        found = {key: tensor.contiguous() for key, tensor in found.items()}
        save_file(found, os.path.join(folder, name, "expected.safetensors"))


main(sys.argv[1])
