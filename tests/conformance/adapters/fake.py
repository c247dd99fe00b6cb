"""What the misbehaving adapters share: each is torch_plain but for what it gives itself."""

import sys
from pathlib import Path

import torch_plain
import ulysses_kit


def serve(attention=torch_plain.attention, setup=torch_plain.setup, features=torch_plain.FEATURES, **declared):
    name = f"fake-{Path(sys.argv[0]).stem}"
    ulysses_kit.serve(
        implementation=name, version="1", features=features, setup=setup, attention=attention, **declared
    )
