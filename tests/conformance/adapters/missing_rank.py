"""Misbehaves: the last rank leaves at its start with status 3 and words on its standard error; no hello from it,
and the others wait for it in the rendezvous."""

import os
import sys

import fake
import torch_plain


def setup(rank):
    if rank.rank == rank.world - 1:
        print(f"rank {rank.rank} finds no device", file=sys.stderr, flush=True)
        os._exit(3)
    torch_plain.setup(rank)


if __name__ == "__main__":
    fake.serve(setup=setup)
