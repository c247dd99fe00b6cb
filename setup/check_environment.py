"""Checks that the Python that runs this has every version the files name.

usage: check_environment.py REQUIREMENTS...

Prints the folder of torch, or says what differs and exits with 1.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

TORCH = "2.11.0"


def main() -> int:
    """Compares what is installed with what is pinned, then tries torch."""
    wrong = []
    for path in sys.argv[1:]:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            pin = re.match(r"([A-Za-z0-9._-]+)==(\S+)", line)
            if pin is None:
                continue
            name, wanted = pin.groups()
            try:
                found = metadata.version(name)
            except metadata.PackageNotFoundError:
                found = None
            # A local version ("2.11.0+cu130") is a build of the same release.
            if found is None or found.split("+")[0] != wanted:
                wrong.append(f"{name} is {found or 'missing'}, not {wanted}")
    try:
        import torch
    except (ImportError, OSError) as error:
        wrong.append(f"torch cannot be imported ({error})")
    else:
        folder = Path(torch.__file__).parent
        if torch.__version__.split("+")[0] != TORCH:
            wrong.append(f"torch is {torch.__version__}, not {TORCH}")
        for needed in ("lib/libtorch_cpu.so", "include/torch/csrc/api/include"):
            if not (folder / needed).exists():
                wrong.append(f"torch has no {needed} in {folder}")
    if wrong:
        print("; ".join(wrong), file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
