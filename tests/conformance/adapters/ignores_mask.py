"""Misbehaves: it does not claim the causal mask, and answers causal cases with full attention, without a word.
What it claims is right."""

import dataclasses

import fake
import torch_plain


def attention(q, k, v, case):
    return torch_plain.attention(q, k, v, dataclasses.replace(case, mask="full"))


if __name__ == "__main__":
    fake.serve(attention=attention, features=[feature for feature in torch_plain.FEATURES if feature != "mask-causal"])
