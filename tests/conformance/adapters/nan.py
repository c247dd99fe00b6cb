"""Misbehaves: one element of out, the last of the last rank, is NaN. Its gradients are right."""

import torch
import torch_plain
import ulysses_kit


def attention(q, k, v, case):
    out = torch_plain.attention(q, k, v, case)
    spot = torch.zeros_like(out)
    if case.rank == case.world - 1:
        spot[-1, -1, -1, -1] = float("nan")
    return out + spot


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="fake-nan",
        version="1",
        features=torch_plain.FEATURES,
        setup=torch_plain.setup,
        attention=attention,
    )
