"""Misbehaves: query head h attends KV head h mod Hkv, not floor(h*Hkv/Hq). Wrong, at every world size, exactly
where 1 < Hkv < Hq; with one KV head or as many as query heads, both orders are the same. It refuses what
torch_plain refuses."""

import fake
import torch_plain
import ulysses_kit


def attention(q, k, v, case):
    if case.kv_heads % case.world != 0 and case.world % case.kv_heads != 0:
        raise ulysses_kit.Unsupported(f"{case.kv_heads} KV heads over {case.world} ranks")
    group = case.query_heads // case.kv_heads
    k, v = (x.repeat(1, 1, group, 1) for x in (k, v))  # right would be repeat_interleave(group, dim=2)
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    fake.serve(attention=attention)
