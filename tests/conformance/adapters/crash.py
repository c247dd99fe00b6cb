"""Misbehaves: rank 1 (rank 0, if alone) kills itself where the sequence is ULYSSES_FAKE_SEQUENCE. Right in all other
cases."""

import os
import signal

import fake
import torch_plain


def attention(q, k, v, case):
    now = case.sequence == int(os.environ["ULYSSES_FAKE_SEQUENCE"])
    if now and case.rank == min(1, case.world - 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    fake.serve(attention=attention)
