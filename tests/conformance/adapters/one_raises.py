"""Misbehaves: rank 0 raises where the sequence is ULYSSES_FAKE_SEQUENCE, and the others wait for it in the exchange.
Right in all other cases."""

import os

import fake
import torch_plain


def attention(q, k, v, case):
    if case.rank == 0 and case.sequence == int(os.environ["ULYSSES_FAKE_SEQUENCE"]):
        raise RuntimeError("boom")
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    fake.serve(attention=attention)
