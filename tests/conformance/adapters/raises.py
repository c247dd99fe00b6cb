"""Misbehaves: every rank raises in case number 1, before any exchange. Right in all other cases, later ones too."""

import torch_plain
import ulysses_kit


def attention(q, k, v, case):
    if case.number == 1:
        raise RuntimeError("boom")
    return torch_plain.attention(q, k, v, case)


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="fake-raises",
        version="1",
        features=torch_plain.FEATURES,
        setup=torch_plain.setup,
        attention=attention,
    )
