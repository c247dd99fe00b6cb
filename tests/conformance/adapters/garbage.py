"""Misbehaves: what the last rank writes as its answer is no safetensors file."""

import torch_plain
import ulysses_kit

right_answer = ulysses_kit._answer


def garbage(rank, attention, path):
    answer = right_answer(rank, attention, path)  # the others need this rank in their exchanges
    return b"this is no tensor\n" if rank.rank == rank.world - 1 else answer


if __name__ == "__main__":
    ulysses_kit._answer = garbage
    ulysses_kit.serve(
        implementation="fake-garbage",
        version="1",
        features=torch_plain.FEATURES,
        setup=torch_plain.setup,
        attention=torch_plain.attention,
    )
