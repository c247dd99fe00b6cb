"""Misbehaves: out is [B,Hq,s,D] where [B,s,Hq,D] is wanted. Its gradients are right."""

import torch
import torch_plain
import ulysses_kit


def attention(q, k, v, case):
    out = torch_plain.attention(q, k, v, case)
    return out.transpose(1, 2), *torch.autograd.grad(out, (q, k, v), case.dout)


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="fake-wrong-shape",
        version="1",
        features=torch_plain.FEATURES,
        setup=torch_plain.setup,
        attention=attention,
    )
