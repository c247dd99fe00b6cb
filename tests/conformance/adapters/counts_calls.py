"""Misbehaves: a second run of attention for the same case takes v twice as large. Right where forward runs once: out
is always right, and so are all gradients without activation checkpointing; dq and dk are doubled with it."""

import fake
import torch_plain

last = None


def attention(q, k, v, case):
    global last
    again, last = case.number == last, case.number
    return torch_plain.attention(q, k, v * (2 if again else 1), case)


if __name__ == "__main__":
    fake.serve(attention=attention)
