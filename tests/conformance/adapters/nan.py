"""Misbehaves: one element of out, the last of the last rank, is NaN. Its gradients are right."""

import fake
import torch
import torch_plain


def attention(q, k, v, case):
    out = torch_plain.attention(q, k, v, case)
    spot = torch.zeros_like(out)
    if case.rank == case.world - 1:
        spot[-1, -1, -1, -1] = float("nan")
    return out + spot


if __name__ == "__main__":
    fake.serve(attention=attention)
