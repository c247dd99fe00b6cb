"""Misbehaves: it does not claim the causal mask, and answers causal cases with full attention, without a word.
What it claims is right."""

import dataclasses

import torch_plain
import ulysses_kit


def attention(q, k, v, case):
    return torch_plain.attention(q, k, v, dataclasses.replace(case, mask="full"))


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="fake-ignores-mask",
        version="1",
        features=[feature for feature in torch_plain.FEATURES if feature != "mask-causal"],
        setup=torch_plain.setup,
        attention=attention,
    )
