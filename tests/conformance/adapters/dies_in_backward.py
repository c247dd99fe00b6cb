"""Misbehaves: where the sequence is ULYSSES_FAKE_SEQUENCE, rank 1 dies of a segmentation fault in backward, behind its
first exchange. Right in all other cases."""

import os
import signal

import fake
import torch
import torch_plain


class DieInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        os.kill(os.getpid(), signal.SIGSEGV)


def attention(q, k, v, case):
    if case.rank == 1 and case.sequence == int(os.environ["ULYSSES_FAKE_SEQUENCE"]):
        q = DieInBackward.apply(q)  # its gradient arrives when that of the exchange before attention has
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    fake.serve(attention=attention)
