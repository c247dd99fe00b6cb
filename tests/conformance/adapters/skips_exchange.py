"""Misbehaves: where the sequence is ULYSSES_FAKE_SEQUENCE, rank 1 leaves out the exchange behind attention, in forward
alone, and then waits for nobody. Right in all other cases."""

import os

import fake
import torch
import torch.distributed as dist
import torch_plain


def attention(q, k, v, case):
    if case.rank != 1 or case.sequence != int(os.environ["ULYSSES_FAKE_SEQUENCE"]):
        return torch_plain.attention(q, k, v, case)
    tokens = torch.cat([x.flatten(2) for x in (q, k, v)], dim=2).unflatten(2, (case.world, -1)).movedim(2, 0)
    dist.all_to_all_single(torch.empty_like(tokens), tokens.contiguous())
    return tuple(torch.zeros_like(x) for x in (case.dout, q, k, v))


if __name__ == "__main__":
    fake.serve(attention=attention)
