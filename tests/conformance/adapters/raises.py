"""Misbehaves: every rank raises where the sequence is ULYSSES_FAKE_SEQUENCE, before any exchange. Right in all
other cases, later ones too."""

import os

import fake
import torch_plain


def attention(q, k, v, case):
    if case.sequence == int(os.environ["ULYSSES_FAKE_SEQUENCE"]):
        raise RuntimeError("boom")
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    fake.serve(attention=attention)
