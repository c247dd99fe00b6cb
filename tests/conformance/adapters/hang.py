"""Misbehaves: where the sequence is ULYSSES_FAKE_SEQUENCE, rank 1 (rank 0, if alone) sleeps forever; the others do not
wait for it and answer with zeros. Right in all other cases."""

import os
import time

import fake
import torch
import torch_plain


def attention(q, k, v, case):
    if case.sequence != int(os.environ["ULYSSES_FAKE_SEQUENCE"]):
        return torch_plain.attention(q, k, v, case)
    while case.rank == min(1, case.world - 1):
        time.sleep(1.0)
    return tuple(torch.zeros_like(x) for x in (case.dout, q, k, v))


if __name__ == "__main__":
    fake.serve(attention=attention)
