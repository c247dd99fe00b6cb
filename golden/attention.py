"""An independent witness of attention and its gradients: JAX on the CPU in float64, by JAX's own autodiff, no PyTorch.

The oracle and the reference of the harness both stand on libtorch. This says the same a third time, from the definition
and with another compiler, another matrix library and another way to differentiate. It writes attention.safetensors, with
the tensors `<case>/out`, `<case>/dq`, `<case>/dk` and `<case>/dv`, and says in provenance.json where they come from:

    pip install -r golden/requirements.txt
    python golden/attention.py

The inputs are those of values.py. A case on one rank stands for the same case on any number of ranks.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy
import safetensors.numpy

import values

jax.config.update("jax_enable_x64", True)

CASES = [
    "attention/p1-b2-s13-hq4-hkv4-d8-full-f64-gaussian-seed1",  # MHA
    "attention/p1-b1-s12-hq4-hkv4-d6-causal-f64-peaked-seed2",
    "attention/p1-b2-s12-hq8-hkv2-d5-full-f64-peaked-seed3",  # GQA
    "attention/p1-b3-s13-hq8-hkv2-d8-causal-f64-gaussian-seed4",
    "attention/p1-b1-s14-hq6-hkv3-d8-causal-f64-peaked-seed5",  # KV heads that two or four ranks cannot share evenly
    "attention/p1-b2-s11-hq12-hkv3-d4-full-f64-gaussian-seed6",
    "attention/p1-b2-s12-hq4-hkv1-d8-causal-f64-gaussian-seed7",  # MQA
    "attention/p1-b1-s13-hq7-hkv7-d3-causal-f64-peaked-seed8",  # query heads that no number of ranks divides
]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """[B,S,Hq,D] from q [B,S,Hq,D], k and v [B,S,Hkv,D]: softmax(q k^T / sqrt(D)) v, head by head."""
    batch, tokens, query_heads, head_size = q.shape
    group = query_heads // k.shape[2]
    heads = []
    for head in range(query_heads):
        scores = jnp.einsum("bqd,bkd->bqk", q[:, :, head], k[:, :, head // group]) / jnp.sqrt(1.0 * head_size)
        if causal:
            unseen = jnp.arange(tokens)[None, :] > jnp.arange(tokens)[:, None]
            scores = jnp.where(unseen, -jnp.inf, scores)
        heads.append(jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, axis=-1), v[:, :, head // group]))
    return jnp.stack(heads, axis=2)


def answer(name: str) -> dict[str, numpy.ndarray]:
    q, k, v, dout = (jnp.array(elements).reshape(shape) for shape, elements in values.tensors(name).values())
    out, gradients = jax.vjp(lambda q, k, v: attention(q, k, v, "-causal-" in name), q, k, v)
    found = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients(dout))))
    return {f"{name}/{tensor}": numpy.asarray(array) for tensor, array in found.items()}


if __name__ == "__main__":
    folder = Path(__file__).parent
    tensors = {key: array for name in CASES for key, array in answer(name).items()}
    assert all(array.dtype == numpy.float64 for array in tensors.values())
    safetensors.numpy.save_file(tensors, folder / "attention.safetensors")
    pinned = [line.split("==")[0] for line in (folder / "requirements.txt").read_text().split()]
    provenance = {
        "attention.safetensors": {
            "sha256": hashlib.sha256((folder / "attention.safetensors").read_bytes()).hexdigest(),
            "command": "python golden/attention.py",
            "python": platform.python_version(),
            "platform": platform.machine(),
            "packages": {name: importlib.metadata.version(name) for name in pinned},
        },
        "values.json": {
            "sha256": hashlib.sha256((folder / "values.json").read_bytes()).hexdigest(),
            "command": "python golden/values.py > golden/values.json",
        },
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
