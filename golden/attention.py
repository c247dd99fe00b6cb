"""An independent witness of attention and its gradients: JAX on the CPU in float64, by JAX's own autodiff, no PyTorch.

The oracle and the reference of the harness both stand on libtorch. This says the same a third time, from the definition
and with another compiler, another matrix library and another way to differentiate. It writes attention.safetensors,
with the tensors `<case>/out`, `<case>/dq` and so on, and says in provenance.json where they come from:

    pip install -r golden/requirements.txt
    python golden/attention.py            # makes the files
    python golden/attention.py --check    # makes the tensors anew in memory and compares; exit code 1 if they differ

The inputs of a case, and which keys its queries see, are those of values.py. A case on one rank stands for the same
case on any number of ranks.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy
import safetensors.numpy

import values

jax.config.update("jax_enable_x64", True)

FOLDER = Path(__file__).parent
ULPS = 32  # by which a tensor made anew may differ, in units of the last place of its largest element

CASES = [
    "attention/p1-b2-s13-hq4-hkv4-d8-full-f64-gaussian-seed1",  # MHA
    "attention/p1-b1-s12-hq4-hkv4-d6-causal-f64-peaked-seed2",
    "attention/p1-b2-s12-hq8-hkv2-d5-full-f64-peaked-seed3",  # GQA
    "attention/p1-b3-s13-hq8-hkv2-d8-causal-f64-gaussian-seed4",
    "attention/p1-b1-s14-hq6-hkv3-d8-causal-f64-peaked-seed5",  # KV heads that two or four ranks cannot share evenly
    "attention/p1-b2-s11-hq12-hkv3-d4-full-f64-gaussian-seed6",
    "attention/p1-b2-s12-hq4-hkv1-d8-causal-f64-gaussian-seed7",  # MQA
    "attention/p1-b1-s13-hq7-hkv7-d3-causal-f64-peaked-seed8",  # query heads that no number of ranks divides
    # One for each feature that changes the numbers, and for each mask that it meets
    "attention/p1-b1-s13-hq4-hkv2-d8-causal-f64-peaked-seed9-dv5",
    "attention/p1-b1-s12-hq6-hkv3-d5-full-f64-gaussian-seed10-dv12",
    "attention/p1-b2-s11-hq4-hkv2-d8-full-f64-gaussian-seed11-cross7",
    "attention/p1-b1-s13-hq4-hkv4-d8-full-f64-peaked-seed12-dv6-cross17-sinks-norms",
    "attention/p1-b1-s13-hq4-hkv2-d8-causal-f64-gaussian-seed13-zigzag",
    "attention/p1-b1-s14-hq5-hkv5-d6-causal-f64-peaked-seed14-striped",
    "attention/p1-b1-s13-hq4-hkv4-d8-causal-f64-peaked-seed15-window4",
    "attention/p1-b1-s12-hq6-hkv2-d8-full-f64-gaussian-seed16-window3",
    "attention/p1-b3-s13-hq4-hkv2-d6-causal-f64-peaked-seed17-docs3",
    "attention/p1-b2-s14-hq4-hkv4-d6-full-f64-gaussian-seed18-docs4",
    "attention/p1-b2-s13-hq4-hkv4-d6-causal-f64-gaussian-seed19-ends4",
    "attention/p1-b3-s11-hq6-hkv2-d6-full-f64-peaked-seed20-ends3",
    "attention/p1-b3-s12-hq4-hkv2-d6-causal-f64-gaussian-seed21-padleft",
    "attention/p1-b3-s13-hq4-hkv4-d6-full-f64-peaked-seed22-padleft",
    "attention/p1-b3-s13-hq4-hkv4-d6-causal-f64-peaked-seed23-padright",
    "attention/p1-b3-s11-hq6-hkv3-d6-full-f64-gaussian-seed24-padright",
    "attention/p1-b1-s13-hq6-hkv3-d8-causal-f64-peaked-seed25-blocks3",
    "attention/p1-b1-s14-hq4-hkv4-d8-full-f64-gaussian-seed26-blocks4",
    "attention/p1-b1-s13-hq5-hkv5-d8-causal-f64-gaussian-seed27-alibi",
    "attention/p1-b2-s12-hq4-hkv2-d8-full-f64-peaked-seed28-alibi",
    "attention/p1-b2-s12-hq6-hkv3-d6-causal-f64-gaussian-seed29-sinks",
    "attention/p1-b1-s13-hq4-hkv4-d8-full-f64-peaked-seed30-sinks",
    "attention/p1-b2-s11-hq6-hkv2-d6-causal-f64-gaussian-seed31-norms",
    "attention/p1-b1-s13-hq4-hkv2-d8-causal-f64-peaked-seed32-rope",
    "attention/p1-b1-s12-hq4-hkv4-d16-full-f64-gaussian-seed33-mrope",
    "attention/p1-b1-s13-hq4-hkv2-d8-causal-f64-gaussian-seed34-softcap2",
    "attention/p1-b1-s12-hq4-hkv2-d8-full-f64-peaked-seed35-scale15",
    "attention/p1-b2-s11-hq4-hkv2-d6-causal-f64-gaussian-seed36-expanded",
    # Values that say where they are from, and a cotangent at one head alone
    "attention/p1-b2-s13-hq4-hkv2-d8-causal-f64-coded-seed44",
    "attention/p1-b1-s12-hq6-hkv3-d6-full-f64-coded-seed45-dv7-dohead4",
    # Ranks without a token
    "attention/p1-b2-s3-hq4-hkv2-d6-causal-f64-gaussian-seed37",
    "attention/p1-b2-s2-hq4-hkv4-d6-full-f64-peaked-seed38-zigzag-sinks",
    # Together: the order of operations, and masks on masks
    "attention/p1-b2-s13-hq4-hkv2-d6-causal-f64-peaked-seed39-docs3-rope",
    "attention/p1-b2-s24-hq6-hkv2-d6-causal-f64-peaked-seed40-window5-docs3-alibi-sinks",
    "attention/p1-b1-s13-hq4-hkv4-d8-full-f64-gaussian-seed41-blocks4-softcap3",
    "attention/p1-b1-s12-hq6-hkv3-d16-causal-f64-gaussian-seed42-dv5-striped-alibi-sinks-norms-mrope-softcap3-scale40",
    "attention/p1-b3-s12-hq4-hkv1-d8-full-f64-peaked-seed43-zigzag-window6-ends2-padright-blocks5-sinks-norms-rope",
]


def seen_keys(case: values.Case) -> numpy.ndarray:
    """[B,Hq,S,S'] of booleans: whether the query of a head and token sees a key."""
    seen = numpy.zeros((case.batch, case.query_heads, case.sequence, case.kv_sequence), dtype=bool)
    for b, heads in enumerate(values.seen_keys(case)):
        for h, queries in enumerate(heads):
            for i, keys in enumerate(queries):
                seen[b, h, i, keys] = True
    return seen


def normed(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Each head of x [B,S,H,D] divided by its root mean square, times the head's weight [H,D]."""
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def rotated(x: jax.Array, positions: numpy.ndarray) -> jax.Array:
    """x [B,S,H,D] with channels c and c+D/2 turned by position * base^(-2c/D), by positions [B,S], or [3,B,S]."""
    pairs = x.shape[-1] // 2
    base = 2.0**pairs  # every frequency is a power of two
    frequencies = numpy.array([base ** (-c / pairs) for c in range(pairs)])
    if positions.ndim == 3:  # time for the first pairs, then height, then width
        spatial = 3 * x.shape[-1] // 16
        component = [0] * (pairs - 2 * spatial) + [1] * spatial + [2] * spatial
        angles = numpy.stack([positions[component[c]] * frequencies[c] for c in range(pairs)], axis=-1)
    else:
        angles = positions[:, :, None] * frequencies
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    low, high = x[..., :pairs], x[..., pairs:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def attention(case: values.Case, inputs: dict[str, jax.Array]) -> jax.Array:
    """[B,S,Hq,Dv] from q [B,S,Hq,D], k [B,S',Hkv,D], v [B,S',Hkv,Dv] and what the case has beside, head by head."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if case.norms:
        q, k = normed(q, inputs["q_norm"]), normed(k, inputs["k_norm"])
    if case.rotary:
        positions = numpy.array(values.position_ids(case), dtype=float)
        q, k = rotated(q, positions), rotated(k, positions)
    seen = seen_keys(case)
    distance = numpy.abs(numpy.arange(case.sequence)[:, None] - numpy.arange(case.kv_sequence)[None, :])
    heads = []
    for head in range(case.query_heads):
        kv_head = head * case.kv_heads // case.query_heads
        products = jnp.einsum("bqd,bkd->bqk", q[:, :, head], k[:, :, kv_head])
        scores = products * (case.scale / 100) if case.scale else products / jnp.sqrt(1.0 * case.head_size)
        if case.softcap:
            scores = case.softcap * jnp.tanh(scores / case.softcap)
        if case.alibi:
            scores = scores - inputs["slopes"][head] * distance
        # A query that sees nothing keeps finite scores, whose weights are then all replaced by 0: a softmax over
        # nothing but -inf would be NaN, and its gradient would stay NaN behind any mask.
        sees = seen[:, head]
        scores = jnp.where(sees | ~sees.any(axis=-1, keepdims=True), scores, -jnp.inf)
        if case.sinks:
            scores = jnp.concatenate([scores, jnp.broadcast_to(inputs["sinks"][head], (*scores.shape[:2], 1))], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[:, :, : case.kv_sequence]
        heads.append(jnp.einsum("bqk,bkd->bqd", jnp.where(sees, weights, 0.0), v[:, :, kv_head]))
    return jnp.stack(heads, axis=2)


def answer(name: str) -> dict[str, numpy.ndarray]:
    """The output and the gradient of each input, as `<case>/<tensor>`."""
    case = values.parse(name)
    inputs = {label: jnp.array(elements).reshape(shape) for label, (shape, elements) in values.tensors(name).items()}
    dout = inputs.pop("dout")
    out, gradients = jax.vjp(lambda inputs: attention(case, inputs), inputs)
    found = {"out": out} | {f"d{label}": gradient for label, gradient in gradients(dout)[0].items()}
    return {f"{name}/{tensor}": numpy.asarray(array) for tensor, array in found.items()}


def answers() -> dict[str, numpy.ndarray]:
    found = {key: array for name in CASES for key, array in answer(name).items()}
    for key, array in found.items():
        assert array.dtype == numpy.float64 and numpy.isfinite(array).all(), key
    return found


def write(tensors: dict[str, numpy.ndarray]) -> None:
    stored = safetensors.numpy.save(tensors)
    (FOLDER / "attention.safetensors").write_bytes(stored)
    pinned = [line.split("==")[0] for line in (FOLDER / "requirements.txt").read_text().split()]
    provenance = {
        "attention.safetensors": {
            "sha256": hashlib.sha256(stored).hexdigest(),
            "command": "python golden/attention.py",
            "python": platform.python_version(),
            "platform": platform.machine(),
            "packages": {name: importlib.metadata.version(name) for name in pinned},
        },
        "values.json": {
            "sha256": hashlib.sha256((FOLDER / "values.json").read_bytes()).hexdigest(),
            "command": "python golden/values.py > golden/values.json",
        },
    }
    (FOLDER / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


def check(tensors: dict[str, numpy.ndarray]) -> int:
    """Prints how far each tensor is from the stored one; 1 if one is beyond the bound or of another shape, else 0."""
    stored = safetensors.numpy.load_file(FOLDER / "attention.safetensors")
    wrong = 0
    for key in sorted(stored.keys() | tensors.keys()):
        if key not in stored or key not in tensors or stored[key].shape != tensors[key].shape:
            shapes = [found[key].shape if key in found else "missing" for found in (stored, tensors)]
            print(f"WRONG {key}: stored {shapes[0]}, made anew {shapes[1]}")
            wrong += 1
            continue
        unit = numpy.finfo(float).eps * numpy.abs(stored[key]).max()
        largest = numpy.abs(tensors[key] - stored[key]).max()
        within = largest <= ULPS * unit
        wrong += not within
        print(f"{'ok   ' if within else 'WRONG'} {key}: {largest:.1e}, {largest / unit if unit else largest:.1f} ulp")
    print(f"{len(tensors)} tensors of {len(CASES)} cases made anew, {wrong} beyond {ULPS} ulp of the largest element")
    return int(wrong > 0)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit("python golden/attention.py [--check]")
    if sys.argv[1:]:
        sys.exit(check(answers()))
    write(answers())
