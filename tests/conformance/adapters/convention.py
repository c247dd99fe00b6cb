"""Right in forward; its arguments say what it declares and by what its gradients are multiplied:

    convention.py UPSTREAM PARAMETERS TOKENS PARTS

UPSTREAM and PARAMETERS are those of the kit; TOKENS (for dq, dk and dv) and PARTS (for this rank's part of dq_norm and
dk_norm) are `1`, `P` or `1/P`."""

import sys

import fake
import torch
import torch_plain


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def normalised(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def attention(q, k, v, case):
    tokens, parts = ({"1": 1, "P": case.world, "1/P": 1 / case.world}[word] for word in sys.argv[3:])
    q, k, v = (ScaleGradient.apply(x, tokens) for x in (q, k, v))
    if case.norms:
        q = normalised(q, ScaleGradient.apply(case.q_norm, parts))
        k = normalised(k, ScaleGradient.apply(case.k_norm, parts))
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    upstream, parameters = sys.argv[1:3]
    fake.serve(
        attention=attention,
        features=[*torch_plain.FEATURES, "qk-norm"],
        upstream=upstream,
        parameters=parameters,
    )
