"""Measures the reference and its rivals in turns, and prints their ratios as Markdown tables.

    .venv/bin/python reference/benches/compare.py [--rounds 15]

Absolute times drift with whatever else a machine does. So every round measures all rivals one after another, in
another order each time; a ratio is taken within a round, and the table shows the median of the rounds with the
quartiles. All rivals run on two cores: two ranks of one thread each, or one process of as many threads as named.

The rivals in Rust (the reference itself, memcpy, dense attention) are those of `measure`, which takes the time
the way criterion has it taken. Those in Python are two ranks of DeepSpeed with gloo, on the same libtorch.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "conformance/adapters"))

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed_start  # before deepspeed, and before torch for its number of threads
import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

RANKS, HEADS, HEAD_SIZE = 2, 8, 64
TOKENS = (256, 1024, 4096)
BYTES = tuple(1 << power for power in (16, 18, 20, 22, 24, 26))
MEASURED_FOR = 0.2  # seconds, of one rival in one round
FORK = multiprocessing.get_context("fork")


def deepspeed_attention(tokens: int, group: dist.ProcessGroup):
    """Forward and backward of DeepSpeed's attention over `tokens` in all, around the kernel that the reference uses."""
    size = (1, tokens // RANKS, HEADS, HEAD_SIZE)
    inputs = [torch.randn(size, requires_grad=True) for _ in range(3)]
    cotangent = torch.randn(size)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    layer = DistributedAttention(kernel, group, scatter_idx=2, gather_idx=1)

    def work() -> None:
        torch.autograd.grad((layer(*inputs, 0) * cotangent).sum(), inputs)

    return work


def gloo_exchange(size: int, group: dist.ProcessGroup):
    """One all_to_all_single of `size` bytes for each rank, from [1,s,H,D] to [1,h,S,D].

    Permuted and made contiguous before and after, as DeepSpeed does. One tensor, where DeepSpeed has three.
    """
    heads = 2 * HEADS  # as many as the query, key and value heads of `measure` together
    tokens = size // (4 * heads * HEAD_SIZE)
    x = torch.rand(1, tokens, heads, HEAD_SIZE)

    def work() -> None:
        send = x.view(1, tokens, RANKS, heads // RANKS, HEAD_SIZE).permute(2, 0, 1, 3, 4).contiguous()
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send, group=group)
        received.permute(1, 3, 0, 2, 4).contiguous().view(1, heads // RANKS, RANKS * tokens, HEAD_SIZE)

    return work


PYTHON_WORKLOADS = {("attention", "deepspeed"): deepspeed_attention, ("exchange", "gloo"): gloo_exchange}


def serve_rank(rank: int, pipe, folder: str) -> None:
    """What a forked rank does: its share of each workload that the parent names, timed."""
    torch.set_num_threads(1)
    place = SimpleNamespace(
        rank=rank, world=RANKS, device=torch.device("cpu"), init_method=f"file://{folder}/rendezvous"
    )
    group = deepspeed_start.setup(place)
    while request := pipe.recv():
        workload, size, iterations = request
        work = PYTHON_WORKLOADS[workload](size, group)
        work()
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(iterations):
            work()
        pipe.send(time.perf_counter() - begun)
    dist.destroy_process_group()


class PythonRanks:
    """Two forked ranks; the slower one counts."""

    def __init__(self, folder: str) -> None:
        ends = [FORK.Pipe() for _ in range(RANKS)]
        self.pipes = [end for end, _ in ends]
        self.ranks = [
            FORK.Process(target=serve_rank, args=(rank, end, folder), daemon=True)
            for rank, (_, end) in enumerate(ends)
        ]
        for rank in self.ranks:
            rank.start()

    def seconds(self, group: str, name: str, size: int, iterations: int) -> float:
        for pipe in self.pipes:
            pipe.send(((group, name), size, iterations))
        return max(pipe.recv() for pipe in self.pipes)

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for rank in self.ranks:
            rank.join()


class RustProgram:
    """`measure`, which answers each line with seconds."""

    def __init__(self) -> None:
        # The profile of everything else: torch-sys is not compiled for another one.
        bench = ["cargo", "bench", "--quiet", "--package=ulysses", "--profile=dev", "--bench=measure"]
        subprocess.run([*bench, "--no-run"], cwd=ROOT, check=True)
        self.program = subprocess.Popen(
            [*bench, "--", "--serve"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, group: str, name: str, size: int, iterations: int) -> float:
        self.program.stdin.write(f"{group} {name} {size} {iterations}\n")
        self.program.stdin.flush()
        return json.loads(self.program.stdout.readline())

    def end(self) -> None:
        self.program.stdin.close()
        self.program.wait()


def measure(rivals: dict, group: str, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds that each rival takes once, in each round."""
    iterations = {}
    for name, where in rivals.items():
        once = where.seconds(group, name, size, 3) / 3
        iterations[name] = max(1, min(20_000, round(MEASURED_FOR / once)))
    times = {name: [] for name in rivals}
    for _ in range(rounds):
        for name in random.sample(list(rivals), len(rivals)):
            times[name].append(rivals[name].seconds(group, name, size, iterations[name]) / iterations[name])
    return times


def ratio(above: list[float], below: list[float], goal: str = "", limit: float | None = None) -> str:
    """The median of the ratios within each round, with the quartiles and whether it reaches the goal."""
    ratios = [a / b for a, b in zip(above, below)]
    low, median, high = statistics.quantiles(ratios, n=4)
    verdict = ""
    if limit is not None:
        reached = median <= limit if goal == "at most" else median >= limit
        verdict = f"; goal {goal} {limit}: {'reached' if reached else 'MISSED'}"
    return f"{median:.2f} ({low:.2f} to {high:.2f}{verdict})"


def milliseconds(times: list[float]) -> str:
    return f"{1000 * statistics.median(times):.3g} ms"


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def attention_table(rust: RustProgram, python: PythonRanks, rounds: int) -> None:
    rivals = {name: rust for name in ("ulysses", "dense-2-threads", "dense-1-thread")} | {"deepspeed": python}
    print("\nAttention, forward and backward: time of the reference over that of\n")
    row("tokens", "reference", "DeepSpeed, gloo", "dense, 2 threads", "half of dense, 1 thread")
    row(*["---"] * 5)
    limits = {256: (0.5, None), 4096: (0.95, 1.1)}
    for tokens in TOKENS:
        times = measure(rivals, "attention", tokens, rounds)
        ours, half = times["ulysses"], [t / 2 for t in times["dense-1-thread"]]
        deepspeed, ideal = limits.get(tokens, (None, None))
        row(
            f"{tokens}",
            milliseconds(ours),
            ratio(ours, times["deepspeed"], "at most", deepspeed),
            ratio(ours, times["dense-2-threads"]),
            ratio(ours, half, "at most", ideal),
        )


def exchange_table(rust: RustProgram, python: PythonRanks, rounds: int) -> None:
    rivals = {name: rust for name in ("ulysses", "all-to-all", "memcpy", "copy-to-new")} | {"gloo": python}
    print("\nExchange with relayout: rate of the reference over that of\n")
    row("bytes of a rank", "reference", "memcpy, to memory in use", "copy, to new memory", "gloo, to new memory")
    row(*["---"] * 5)
    for size in BYTES:
        times = measure(rivals, "exchange", size, rounds)
        ours = times["ulysses"]
        row(
            f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB",
            milliseconds(ours),
            ratio(times["memcpy"], times["all-to-all"], "at least", 0.55 if size >= 1 << 24 else None),
            ratio(times["copy-to-new"], ours),
            ratio(times["gloo"], ours, "at least", 2),
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--only", choices=("attention", "exchange"))
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = PythonRanks(folder)  # forked before anything here has threads
        rust = RustProgram()
        if chosen.only != "exchange":
            attention_table(rust, python, chosen.rounds)
        if chosen.only != "attention":
            exchange_table(rust, python, chosen.rounds)
        rust.end()
        python.end()


if __name__ == "__main__":
    main()
