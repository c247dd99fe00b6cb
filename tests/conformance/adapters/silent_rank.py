"""Misbehaves: the last rank lives, but never comes out of its setup; no hello from it."""

import time

import torch_plain
import ulysses_kit


def setup(rank):
    while rank.rank == rank.world - 1:
        time.sleep(1.0)
    torch_plain.setup(rank)


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="fake-silent-rank",
        version="1",
        features=torch_plain.FEATURES,
        setup=setup,
        attention=torch_plain.attention,
    )
