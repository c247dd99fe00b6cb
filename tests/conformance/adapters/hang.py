"""Misbehaves: in case number 1, rank 1 (rank 0, if alone) sleeps forever; the others do not wait for it and answer
with zeros. Right in all other cases."""

import time

import torch
import torch_plain
import ulysses_kit


def attention(q, k, v, case):
    if case.number != 1:
        return torch_plain.attention(q, k, v, case)
    while case.rank == min(1, case.world - 1):
        time.sleep(1.0)
    return tuple(torch.zeros_like(x) for x in (q, q, k, v))


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="fake-hang",
        version="1",
        features=torch_plain.FEATURES,
        setup=torch_plain.setup,
        attention=attention,
    )
