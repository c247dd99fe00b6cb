"""Misbehaves: where the sequence is ULYSSES_FAKE_SEQUENCE, rank 1 waits for rank 0 in a receive, where the others enter
the exchange. Right in all other cases."""

import os

import fake
import torch
import torch_plain
from torch.distributed import recv  # a name of the module's own: the kit sees what is called by it as well


def attention(q, k, v, case):
    if case.rank == 1 and case.sequence == int(os.environ["ULYSSES_FAKE_SEQUENCE"]):
        recv(torch.empty(1), src=0)
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    fake.serve(attention=attention)
