"""Misbehaves: where the sequence is ULYSSES_FAKE_SEQUENCE, what the last rank writes as its answer is no safetensors
file. Right in all other cases."""

import os

import fake
import ulysses_kit

right_answer = ulysses_kit._answer


def garbage(rank, attention, path):
    answer = right_answer(rank, attention, path)  # the others need this rank in their exchanges
    now = f"-s{os.environ['ULYSSES_FAKE_SEQUENCE']}-".encode() in path.read_bytes()  # the case's name
    return b"this is no tensor\n" if now and rank.rank == rank.world - 1 else answer


if __name__ == "__main__":
    ulysses_kit._answer = garbage
    fake.serve()
