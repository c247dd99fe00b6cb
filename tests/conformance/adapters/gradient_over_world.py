"""Misbehaves: forward is right, every gradient is divided by the world size. Right on one rank."""

import fake
import torch
import torch_plain


class DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, divisor):
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.divisor, None


def attention(q, k, v, case):
    q, k, v = (DivideGradient.apply(x, case.world) for x in (q, k, v))
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    fake.serve(attention=attention)
