"""Misbehaves: the last rank lives, but never comes out of its setup; no hello from it."""

import time

import fake
import torch_plain


def setup(rank):
    while rank.rank == rank.world - 1:
        time.sleep(1.0)
    torch_plain.setup(rank)


if __name__ == "__main__":
    fake.serve(setup=setup)
