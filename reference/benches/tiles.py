"""Measures tiled MLP and tiled loss beside the same untiled and beside DeepSpeed's, and prints Markdown tables.

    .venv/bin/python reference/benches/tiles.py [--rounds 3]

Each measurement is forward and backward once, in a process of its own with one thread: the peak of its resident
memory above what was resident before, inputs and cotangent included, and its processor time, which does not count the
time that other programs take. glibc is told to give every block from 1 MiB on back to the system when it is freed: its
heap otherwise keeps gaps between the blocks of a tile, and the peak is then of its gaps too. A round measures all rivals
one after another, in another order each time; a ratio is taken within a round, and the tables show medians.

`tiles/main.rs` measures the reference and the untiled function on the same libtorch; what DeepSpeed does instead is here.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FEATURES, WIDE, CLASSES = 512, 1792, 32768  # as in tiles/main.rs
TILES = 16
TOKENS = {"mlp": 98304, "loss": 16384}
GOALS = {"mlp": 6, "loss": 8}
RIVALS = ("untiled", "ulysses", "deepspeed")
TIME_GOAL = 1.4


def deepspeed(function: str, tokens: int) -> None:
    """One measurement of DeepSpeed, printed as `tiles/main.rs` does."""
    sys.path.insert(0, str(ROOT / "conformance/adapters"))
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed_start  # noqa: F401  before deepspeed
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP
    from torch.nn.functional import cross_entropy, silu

    torch.set_num_threads(1)

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(FEATURES, WIDE, bias=False)
            self.up = torch.nn.Linear(FEATURES, WIDE, bias=False)
            self.down = torch.nn.Linear(WIDE, FEATURES, bias=False)

    def mlp(tokens: int):
        module = Mlp()
        hidden = torch.rand(1, tokens, FEATURES).requires_grad_()
        cotangent = torch.rand(1, tokens, FEATURES)

        def tile(module: Mlp, hidden: torch.Tensor) -> torch.Tensor:
            return module.down(silu(module.gate(hidden)) * module.up(hidden))

        def work() -> None:
            output = TiledMLP.apply(tile, module, hidden, TILES, list(module.parameters()))
            output.backward(cotangent)

        return work

    def loss(tokens: int):
        head = torch.nn.Linear(FEATURES, CLASSES, bias=False)
        hidden = torch.rand(1, tokens, FEATURES).requires_grad_()
        labels = torch.randint(CLASSES, (1, tokens))

        def tile(head: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return cross_entropy(head(hidden), labels, ignore_index=-100, reduction="sum")

        def work() -> None:
            total = TiledFusedLogitsLoss.apply(tile, head, hidden, labels, None, TILES, [head.weight], "sum")
            total.backward()

        return work

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    def processor_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    make = {"mlp": mlp, "loss": loss}[function]
    make(64)()
    work = make(tokens)
    Path("/proc/self/clear_refs").write_text("5")
    resident, begun = status("VmRSS"), processor_seconds()
    work()
    print(json.dumps({"bytes": status("VmHWM") - resident, "seconds": processor_seconds() - begun}))


def build() -> str:
    """The program of `tiles/main.rs`."""
    # The profile of everything else: torch-sys is not compiled for another one.
    command = ["cargo", "bench", "--package=ulysses", "--profile=dev", "--bench=tiles", "--no-run"]
    output = subprocess.run(
        [*command, "--message-format=json"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    messages = (json.loads(line) for line in output.splitlines())
    return next(message["executable"] for message in messages if message.get("executable"))


def measure(program: str, rival: str, function: str, tokens: int, heap: bool) -> dict:
    if rival == "deepspeed":
        command = [sys.executable, __file__, "--deepspeed", function, "--tokens", str(tokens)]
    else:
        command = [program, function, rival, str(tokens), str(TILES)]
    environment = os.environ if heap else os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    output = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def table(program: str, function: str, rounds: int, heap: bool) -> None:
    tokens = TOKENS[function]
    measured = {rival: [] for rival in RIVALS}
    for _ in range(rounds):
        for rival in random.sample(RIVALS, len(RIVALS)):
            measured[rival].append(measure(program, rival, function, tokens, heap))
    median = {
        rival: {what: statistics.median(once[what] for once in all_of) for what in ("bytes", "seconds")}
        for rival, all_of in measured.items()
    }
    print(f"\n{function}, {tokens} tokens, {TILES} tiles{', in the heap of glibc' if heap else ''}\n")
    print("| | peak above the inputs | untiled is | processor time | of untiled |\n| --- | --- | --- | --- | --- |")
    for rival in RIVALS:
        peak, seconds = median[rival]["bytes"], median[rival]["seconds"]
        less = median["untiled"]["bytes"] / peak
        longer = statistics.median(
            once["seconds"] / untiled["seconds"] for once, untiled in zip(measured[rival], measured["untiled"])
        )
        if rival == "untiled":
            cells = ("", "")
        else:
            goals = [less >= GOALS[function], longer <= TIME_GOAL] if rival == "ulysses" else []
            marks = ["; goal: reached" if goal else "; goal: MISSED" for goal in goals] or ["", ""]
            cells = (f"{less:.1f} times{marks[0]}", f"{longer:.2f}{marks[1]}")
        print(f"| {rival} | {peak / 2**20:.0f} MiB | {cells[0]} | {seconds:.1f} s | {cells[1]} |", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", choices=tuple(TOKENS))
    arguments.add_argument("--heap", action="store_true", help="leave glibc's heap as it is")
    arguments.add_argument("--deepspeed", choices=tuple(TOKENS), help=argparse.SUPPRESS)
    arguments.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.deepspeed:
        return deepspeed(chosen.deepspeed, chosen.tokens)
    program = build()
    for function in TOKENS:
        if chosen.only in (None, function):
            table(program, function, chosen.rounds, chosen.heap)


if __name__ == "__main__":
    main()
