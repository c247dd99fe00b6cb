"""Behaves, but talks: more than a pipe holds (64 KiB), at the start into the launcher's streams, and in every case
from every rank. A judge that does not drain or keep streams apart stumbles over it. Its answers are right."""

import os
import sys

import fake
import torch_plain


def talk(words):
    for line in range(2000):
        print(f"{words}: line {line} of what nobody asked for")
        print(f"{words}: warning {line}", file=sys.stderr)
    os.write(1, f"{words}: straight to descriptor 1\n".encode() * 2000)
    os.write(2, f"{words}: straight to descriptor 2, and no UTF-8: ".encode() + b"\xff\xfe\x00\n")


def attention(q, k, v, case):
    talk(f"rank {case.rank}, case {case.number}")
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    talk("launcher")
    fake.serve(attention=attention)
