"""An independent witness of the harness' value function, in pure Python: no numpy, no torch, integers and doubles.

The harness makes the inputs of a case from its name alone, so that a case can be made again anywhere. This file
says the same thing a second time and shares no code with it. It prints values.json:

    python golden/values.py > golden/values.json

Not here: the layout of shards, and everything that is computed from the values.
"""

import hashlib
import json
import math
import re
import struct

MASK = (1 << 64) - 1
Q, K, V, DOUT, PEAK = range(5)  # tensor identifiers; PEAK picks the key that a query of content "peaked" leans on

CASES = [
    "attention/p1-b1-s3-hq1-hkv1-d2-full-f64-gaussian-seed0",
    "attention/p2-b3-s10-hq4-hkv2-d16-causal-f64-gaussian-seed7",
    "attention/p2-b3-s10-hq4-hkv2-d16-causal-f64-peaked-seed7",
    "attention/p3-b2-s7-hq6-hkv3-d5-full-f64-peaked-seed18446744073709551615",
    "attention/p4-b2-s9-hq6-hkv1-d12-causal-f32-peaked-seed1",
    "attention/p2-b1-s6-hq3-hkv3-d20-full-bf16-gaussian-seed42",
    "attention/p2-b2-s5-hq4-hkv2-d8-causal-bf16-peaked-seed3",
    "attention/p2-b2-s5-hq4-hkv2-d8-causal-f16-peaked-seed3",
]
# Ties, to both sides, and just above a tie: who goes to 16 bits by way of f32 rounds twice, and that one down.
ROUNDED = [
    (dtype, sign * (1.0 + x))
    for dtype, step in (("f32", 2.0**-23), ("f16", 2.0**-10), ("bf16", 2.0**-7))
    for sign, x in ((1.0, step / 2), (1.0, 1.5 * step), (1.0, step / 2 + 2.0**-40), (-1.0, step / 2 - 2.0**-40))
]
NAME = re.compile(
    r"attention/p(?P<world>\d+)-b(?P<batch>\d+)-s(?P<sequence>\d+)-hq(?P<query_heads>\d+)-hkv(?P<kv_heads>\d+)"
    r"-d(?P<head_size>\d+)-(?P<mask>causal|full)-(?P<dtype>f64|f32|bf16|f16)-(?P<content>gaussian|peaked)"
    r"-seed(?P<seed>\d+)"
)


def mix64(x: int) -> int:
    """The finaliser of splitmix64."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def place_hash(seed: int, *place: int) -> int:
    """One word for (tensor, batch, token, head, channel): a fold, so that every word goes through all later mixes."""
    h = mix64(seed)
    for word in place:
        h = mix64(h ^ word)
    return h


def gaussian(seed: int, *place: int) -> float:
    """Irwin-Hall of eight 16-bit integers: mean 0, variance 1, and no transcendental function on the way."""
    a = place_hash(seed, *place)
    total = sum((word >> shift) & 0xFFFF for word in (a, mix64(a)) for shift in (0, 16, 32, 48))
    return float(total - 262140) / math.sqrt(8.0 * (65536.0**2 - 1.0) / 12.0)


def round_to(dtype: str, x: float) -> float:
    """The nearest value of the dtype, ties to even, as a double."""
    if dtype == "f64":
        return x
    if dtype in ("f32", "f16"):
        code = {"f32": "<f", "f16": "<e"}[dtype]
        return struct.unpack(code, struct.pack(code, x))[0]
    # bf16: eight bits of significand, straight from the double and not by way of f32, which would round twice
    mantissa, exponent = math.frexp(x)  # normal numbers only: no value here is near 2^-126, except zero
    return math.ldexp(round(mantissa * 256.0), exponent - 8)  # round() takes ties to even; times 256 is exact


def tensors(name: str) -> dict[str, tuple[list[int], list[float]]]:
    """Shape and elements of q, k, v, dout, in [batch, token, head, channel] order."""
    case = NAME.fullmatch(name).groupdict()
    batch, sequence, query_heads, kv_heads, head_size, seed = (
        int(case[key]) for key in ("batch", "sequence", "query_heads", "kv_heads", "head_size", "seed")
    )

    def element(tensor: int, b: int, t: int, h: int, c: int) -> float:
        plain = gaussian(seed, tensor, b, t, h, c)
        if tensor != Q or case["content"] == "gaussian":
            return plain
        visible = t + 1 if case["mask"] == "causal" else sequence
        key = place_hash(seed, PEAK, b, t, h, 0) % visible
        gain = 5.0 / math.sqrt(float(head_size))
        return gain * gaussian(seed, K, b, key, h * kv_heads // query_heads, c) + 0.5 * plain

    found = {}
    sides = {"q": (Q, query_heads), "k": (K, kv_heads), "v": (V, kv_heads), "dout": (DOUT, query_heads)}
    for label, (tensor, heads) in sides.items():
        values = [
            round_to(case["dtype"], element(tensor, b, t, h, c))
            for b in range(batch) for t in range(sequence) for h in range(heads) for c in range(head_size)
        ]  # fmt: skip
        found[label] = ([batch, sequence, heads, head_size], values)
    return found


def place_of(flat: int, shape: list[int]) -> list[int]:
    index = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.insert(0, place)
    return index


def witness() -> dict[str, list[dict]]:
    """From the parts to the whole, so that the first list that differs says where to look."""
    words = [0, 1, 0x0123456789ABCDEF, MASK]
    places = [[0, Q, 0, 0, 0, 0], [0, Q, 0, 0, 0, 1], [7, DOUT, 2, 9, 3, 15], [MASK, PEAK, 1, 6, 5, 0]]
    elements, digests = [], []
    for name in CASES:
        for label, (shape, values) in tensors(name).items():
            for flat in sorted({0, len(values) // 3, len(values) - 1}):
                index = place_of(flat, shape)
                elements.append({"name": name, "tensor": label, "index": index, "value": values[flat].hex()})
            digest = hashlib.sha256(b"".join(struct.pack("<d", value) for value in values)).hexdigest()
            digests.append({"name": name, "tensor": label, "shape": shape, "sha256": digest})
    return {
        "mix64": [{"x": f"{x:016x}", "mixed": f"{mix64(x):016x}"} for x in words],
        "hash": [{"place": place, "hash": f"{place_hash(*place):016x}"} for place in places],
        "round": [{"dtype": dtype, "x": x.hex(), "rounded": round_to(dtype, x).hex()} for dtype, x in ROUNDED],
        "gaussian": [{"place": place, "value": gaussian(*place).hex()} for place in places],
        "elements": elements,
        "sha256": digests,
    }


if __name__ == "__main__":
    lists = [f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for key, rows in witness().items()]
    print("{\n" + ",\n".join(lists) + "\n}")
