"""An independent witness of the harness' value function, in pure Python: no numpy, no torch, integers and doubles.

The harness makes the inputs of a case from its name alone, so that a case can be made again anywhere. This file
says the same thing a second time and shares no code with it. It prints values.json:

    python golden/values.py > golden/values.json

Of what a name may say behind the seed, here is what the inputs and the structure of a case depend on. Not here:
everything that is computed from the values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import struct

MASK = (1 << 64) - 1
# Tensor identifiers. PEAK picks the key that a query of content "peaked" leans on, the next three draw the structure.
Q, K, V, DOUT, PEAK, DOCUMENTS, PADDING, LAYOUT, SINKS, Q_NORM, K_NORM = range(11)

CASES = [
    "attention/p1-b1-s3-hq1-hkv1-d2-full-f64-gaussian-seed0",
    "attention/p2-b3-s10-hq4-hkv2-d16-causal-f64-gaussian-seed7",
    "attention/p2-b3-s10-hq4-hkv2-d16-causal-f64-peaked-seed7",
    "attention/p3-b2-s7-hq6-hkv3-d5-full-f64-peaked-seed18446744073709551615",
    "attention/p4-b2-s9-hq6-hkv1-d12-causal-f32-peaked-seed1",
    "attention/p2-b1-s6-hq3-hkv3-d20-full-bf16-gaussian-seed42",
    "attention/p2-b2-s5-hq4-hkv2-d8-causal-bf16-peaked-seed3",
    "attention/p2-b2-s5-hq4-hkv2-d8-causal-f16-peaked-seed3",
    # behind the seed: other sizes of V, another sequence of keys, one row for all
    "attention/p2-b2-s6-hq4-hkv2-d8-causal-f64-peaked-seed4-dv5",
    "attention/p2-b1-s5-hq4-hkv2-d4-full-f32-peaked-seed5-dv3-cross11",
    "attention/p2-b3-s6-hq4-hkv2-d4-causal-f64-peaked-seed6-expanded",
    "attention/p2-b2-s5-hq2-hkv1-d4-causal-bf16-onehot-seed8-dv7",
    # what a peaked query points at, where it sees but some keys
    "attention/p2-b2-s19-hq2-hkv1-d4-causal-f64-peaked-seed9-window4",
    "attention/p2-b1-s17-hq2-hkv2-d4-full-f64-peaked-seed10-window3",
    "attention/p2-b3-s16-hq2-hkv1-d4-causal-f64-peaked-seed11-docs4",
    "attention/p2-b2-s16-hq2-hkv1-d16-full-f64-peaked-seed12-ends5-mrope",
    "attention/p2-b4-s15-hq2-hkv1-d4-full-f64-peaked-seed13-padleft",
    "attention/p2-b4-s15-hq2-hkv1-d4-causal-f16-peaked-seed14-padright",
    "attention/p2-b1-s18-hq4-hkv2-d4-causal-f64-peaked-seed15-blocks4",
    "attention/p2-b2-s23-hq3-hkv3-d4-full-f64-peaked-seed16-window7-docs3-padleft-blocks5",
    # what belongs to the heads
    "attention/p2-b1-s4-hq6-hkv3-d4-full-f64-gaussian-seed17-alibi-sinks-norms",
    "attention/p3-b1-s4-hq6-hkv2-d5-full-bf16-gaussian-seed18-alibi-sinks-norms",
    # values that say where they are from
    "attention/p2-b3-s19-hq4-hkv2-d16-causal-f64-coded-seed19",
    "attention/p2-b2-s18-hq4-hkv2-d7-full-bf16-coded-seed20-dv6-window6",
    "attention/p1-b1-s6-hq2-hkv1-d1-full-f64-coded-seed21",
    "attention/p2-b3-s6-hq4-hkv2-d8-causal-f32-coded-seed22-expanded",
    # a cotangent on one rank or head alone
    "attention/p3-b2-s8-hq4-hkv2-d4-full-f64-gaussian-seed23-dorank0",
    "attention/p3-b1-s11-hq4-hkv2-d4-causal-f64-peaked-seed24-dorank2",
    "attention/p2-b2-s11-hq4-hkv2-d4-causal-f64-coded-seed25-zigzag-dorank1",
    "attention/p3-b1-s11-hq4-hkv2-d4-causal-f64-coded-seed26-striped-padleft-dorank1",
    "attention/p2-b2-s7-hq4-hkv2-d5-full-f32-coded-seed27-dv3-dohead3",
    "attention/p2-b1-s7-hq4-hkv4-d5-full-f64-gaussian-seed28-dohead0-packed",
]
# Ties, to both sides, and just above a tie: who goes to 16 bits by way of f32 rounds twice, and that one down.
ROUNDED = [
    (dtype, sign * (1.0 + x))
    for dtype, step in (("f32", 2.0**-23), ("f16", 2.0**-10), ("bf16", 2.0**-7))
    for sign, x in ((1.0, step / 2), (1.0, 1.5 * step), (1.0, step / 2 + 2.0**-40), (-1.0, step / 2 - 2.0**-40))
]
NAME = re.compile(
    r"attention/p(?P<world>\d+)-b(?P<batch>\d+)-s(?P<sequence>\d+)-hq(?P<query_heads>\d+)-hkv(?P<kv_heads>\d+)"
    r"-d(?P<head_size>\d+)-(?P<mask>causal|full)-(?P<dtype>f64|f32|bf16|f16)-(?P<content>gaussian|peaked|onehot|coded)"
    r"-seed(?P<seed>\d+)"
    r"(-dv(?P<value_size>\d+))?(-cross(?P<cross>\d+))?(-(?P<sharding>zigzag|striped))?(-(?P<eval>eval))?"
    r"(-window(?P<window>\d+))?(-docs(?P<docs>\d+)|-ends(?P<ends>\d+))?(-pad(?P<padding>left|right))?"
    r"(-blocks(?P<block>\d+))?(-(?P<alibi>alibi))?(-(?P<sinks>sinks))?(-(?P<norms>norms))?(-(?P<rotary>rope|mrope))?"
    r"(-softcap(?P<softcap>\d+))?(-scale(?P<scale>\d+))?(-dropout(?P<dropout>\d+))?"
    r"(-dorank(?P<cotangent_rank>\d+)|-dohead(?P<cotangent_head>\d+))?"
    r"(-(?P<strides>transposed|packed|expanded))?"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a name says, up to the strides. A number that it does not say is None."""

    name: str
    world: int
    batch: int
    sequence: int
    query_heads: int
    kv_heads: int
    head_size: int
    causal: bool
    dtype: str
    content: str
    seed: int
    value_size: int  # head_size, if the name says nothing else
    kv_sequence: int  # sequence, if the name says nothing else
    cross: bool
    sharding: str | None
    eval: bool
    window: int | None
    docs: int | None
    ends: int | None
    padding: str | None
    block: int | None
    alibi: bool
    sinks: bool
    norms: bool
    rotary: str | None
    softcap: int | None
    scale: int | None  # in hundredths
    dropout: int | None  # in hundredths
    cotangent_rank: int | None
    cotangent_head: int | None
    strides: str | None


def parse(name: str) -> Case:
    said = NAME.fullmatch(name)
    if said is None:
        raise ValueError(f"{name} is not a name of which the inputs are known here")
    said = {key: int(text) if text and text.isdecimal() else text for key, text in said.groupdict().items()}
    said |= {flag: said[flag] is not None for flag in ("eval", "alibi", "sinks", "norms")}
    said |= {
        "causal": said.pop("mask") == "causal",
        "value_size": said["value_size"] or said["head_size"],
        "kv_sequence": said["cross"] or said["sequence"],
        "cross": said["cross"] is not None,
    }
    return Case(name=name, **said)


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


def document_ends(case: Case) -> list[list[int]]:
    """For each row of the batch, how many tokens there are up to the end of each document. One document is the rule."""
    rows = []
    for b in range(case.batch):
        by_draw = sorted(range(1, case.sequence), key=lambda t: (place_hash(case.seed, DOCUMENTS, b, t, 0, 0), t))
        rows.append(sorted(by_draw[: (case.docs or case.ends or 1) - 1]) + [case.sequence])
    return rows


def real_tokens(case: Case) -> list[range]:
    """For each row of the batch, the tokens that are no padding."""
    rows = []
    for b in range(case.batch):
        pads = place_hash(case.seed, PADDING, b, 0, 0, 0) % (case.sequence // 2) if case.padding else 0
        first = pads if case.padding == "left" else 0
        rows.append(range(first, first + case.sequence - pads))
    return rows


def runs(length: int, parts: int) -> list[list[int]]:
    """Consecutive runs of tokens, of which the first are one longer where the parts do not divide the length."""
    tokens = iter(range(length))
    return [list(itertools.islice(tokens, length // parts + (p < length % parts))) for p in range(parts)]


def tokens_of(case: Case, rank: int) -> list[int]:
    """The tokens that a rank holds in training."""
    if case.sharding == "striped":
        return [t for t in range(case.sequence) if t % case.world == rank]
    if case.sharding == "zigzag":
        chunks = runs(case.sequence, 2 * case.world)
        return chunks[rank] + chunks[-1 - rank]
    return runs(case.sequence, case.world)[rank]


def layout(case: Case) -> list[list[list[bool]]] | None:
    """Whether the queries of a block see the keys of a block, [query head][block][block]."""
    if case.block is None:
        return None
    blocks = range(-(-case.sequence // case.block))
    return [
        [[i == j or place_hash(case.seed, LAYOUT, h, i, j, 0) % 2 == 1 for j in blocks] for i in blocks]
        for h in range(case.query_heads)
    ]


def position_ids(case: Case) -> list:
    """[batch][token]; [3][batch][token] with three components."""
    rows = []
    for ends in document_ends(case):
        starts = [0, *ends[:-1]] if case.docs else [0]
        rows.append([t - max(start for start in starts if start <= t) for t in range(case.sequence)])
    if case.rotary != "mrope":
        return rows
    components = (lambda t: t, lambda t: 5 * t % 11, lambda t: t // 3)
    return [[[component(t) for t in row] for row in rows] for component in components]


def seen_keys(case: Case) -> list[list[list[list[int]]]]:
    """The keys that a query sees, [batch][query head][token], ascending."""
    ends, real, blocks = document_ends(case), real_tokens(case), layout(case)

    def sees(b: int, h: int, i: int, j: int) -> bool:
        if case.cross:
            return True
        return (
            (j <= i or not case.causal)
            and (case.window is None or abs(i - j) < case.window)
            and all((i < end) == (j < end) for end in ends[b])
            and (i in real[b] and j in real[b])
            and (blocks is None or blocks[h][i // case.block][j // case.block])
        )

    return [
        [
            [[j for j in range(case.kv_sequence) if sees(b, h, i, j)] for i in range(case.sequence)]
            for h in range(case.query_heads)
        ]
        for b in range(case.batch)
    ]


def tensors(name: str) -> dict[str, tuple[list[int], list[float]]]:
    """Shape and elements of q, k, v, dout in [batch, token, head, channel] order, and of what belongs to the heads."""
    case = parse(name)
    seen, real = seen_keys(case), real_tokens(case)
    with_cotangent = range(case.sequence) if case.cotangent_rank is None else tokens_of(case, case.cotangent_rank)
    root = math.sqrt(float(case.head_size))

    def key(b: int, t: int, h: int, c: int) -> float:
        return gaussian(case.seed, K, 0 if case.strides == "expanded" else b, t, h, c)

    def query(b: int, t: int, h: int, c: int) -> float:
        plain = gaussian(case.seed, Q, b, t, h, c)
        if case.content not in ("peaked", "coded"):
            return plain
        noise = plain * (0.5 if case.content == "peaked" else 0.25)
        keys = seen[b][h][t]
        if not keys:
            return noise
        target = keys[place_hash(case.seed, PEAK, b, t, h, 0) % len(keys)]
        leaned_on = [key(b, target, h * case.kv_heads // case.query_heads, i) for i in range(case.head_size)]
        gain = 5.0 / root
        if case.content == "coded":
            square = 0.0
            for x in leaned_on:  # not sum(), which some Pythons compensate
                square += x * x
            gain = 7.5 * root / max(square, 1.0)
        return gain * leaned_on[c] + noise

    def value(b: int, t: int, h: int, c: int) -> float:
        if case.content == "onehot":
            return 1.0 if c == t else 0.0
        if case.content == "coded":
            row = 0 if case.strides == "expanded" else b
            check = (t + 5 * h + 7 * row) % 17
            return float([row + 1, h + 1, t // 16, t % 16 - 8, check - 8][c % 5])
        return gaussian(case.seed, V, 0 if case.strides == "expanded" else b, t, h, c)

    def cotangent(b: int, t: int, h: int, c: int) -> float:
        is_there = t in real[b] and t in with_cotangent and case.cotangent_head in (None, h)
        return gaussian(case.seed, DOUT, b, t, h, c) if is_there else 0.0

    def slope(h: int) -> float:
        return 0.125 * (h + 1) / case.query_heads

    def sink(h: int) -> float:
        return gaussian(case.seed, SINKS, 0, 0, h, 0)

    def q_norm(h: int, c: int) -> float:
        return 1.0 + 0.25 * gaussian(case.seed, Q_NORM, 0, 0, h, c)

    def k_norm(h: int, c: int) -> float:
        return 1.0 + 0.25 * gaussian(case.seed, K_NORM, 0, 0, h, c)

    sides = {
        "q": (query, [case.batch, case.sequence, case.query_heads, case.head_size]),
        "k": (key, [case.batch, case.kv_sequence, case.kv_heads, case.head_size]),
        "v": (value, [case.batch, case.kv_sequence, case.kv_heads, case.value_size]),
        "dout": (cotangent, [case.batch, case.sequence, case.query_heads, case.value_size]),
    }
    if case.alibi:
        sides["slopes"] = (slope, [case.query_heads])
    if case.sinks:
        sides["sinks"] = (sink, [case.query_heads])
    if case.norms:
        sides["q_norm"] = (q_norm, [case.query_heads, case.head_size])
        sides["k_norm"] = (k_norm, [case.kv_heads, case.head_size])
    return {
        label: (shape, [round_to(case.dtype, element(*place)) for place in itertools.product(*map(range, shape))])
        for label, (element, shape) in sides.items()
    }


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
    elements, digests, structures = [], [], []
    for name in CASES:
        for label, (shape, values) in tensors(name).items():
            for flat in sorted({0, len(values) // 3, len(values) - 1}):
                index = place_of(flat, shape)
                elements.append({"name": name, "tensor": label, "index": index, "value": values[flat].hex()})
            digest = hashlib.sha256(b"".join(struct.pack("<d", value) for value in values)).hexdigest()
            digests.append({"name": name, "tensor": label, "shape": shape, "sha256": digest})
        case = parse(name)
        if case.docs or case.ends or case.padding or case.block or case.window:
            structure = {
                "document_ends": document_ends(case),
                "real_tokens": [[real.start, real.stop] for real in real_tokens(case)],
                "layout": None if case.block is None else [[[int(b) for b in row] for row in h] for h in layout(case)],
                "position_ids": position_ids(case),
                "seen": [[[sum(1 << j for j in keys) for keys in head] for head in row] for row in seen_keys(case)],
            }
            structures.append({"name": name} | structure)
    return {
        "mix64": [{"x": f"{x:016x}", "mixed": f"{mix64(x):016x}"} for x in words],
        "hash": [{"place": place, "hash": f"{place_hash(*place):016x}"} for place in places],
        "round": [{"dtype": dtype, "x": x.hex(), "rounded": round_to(dtype, x).hex()} for dtype, x in ROUNDED],
        "gaussian": [{"place": place, "value": gaussian(*place).hex()} for place in places],
        "elements": elements,
        "sha256": digests,
        "structure": structures,
    }


if __name__ == "__main__":
    lists = [f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for key, rows in witness().items()]
    print("{\n" + ",\n".join(lists) + "\n}")
