"""Misbehaves: it reads q, k and v as if they were contiguous, whatever their strides say. Right where they are."""

import fake
import torch
import torch_plain


def as_if_contiguous(x):
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


def attention(q, k, v, case):
    return torch_plain.attention(*(as_if_contiguous(x) for x in (q, k, v)), case)


if __name__ == "__main__":
    fake.serve(attention=attention)
