"""Measures exchange and attention on a GPU beside what they are held to there, and prints Markdown tables.

    .venv/bin/python reference/benches/gpu.py [--quick]

`gpu/main.rs` takes the times of the reference, of copies within the GPU and of dense attention; what
`torch.distributed.all_to_all_single` takes, between `permute` and `contiguous` as DeepSpeed has them, is taken here.
All by events of CUDA, after a warm-up; a figure is the median of the repetitions, and a ratio is of one run.

`make gpu-check` runs this from its folder, where the program is built already (--program).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEADS, HEAD_SIZE, TENSORS = 32, 128, 3  # as in gpu/workloads.rs
TURNS, WARM_UP = 5, 3  # as in gpu/ranks.rs
LIMIT = 150  # seconds for the ranks of one measurement over processes


def all_to_all(rank: int, ranks: int, device: str, tokens: list[int], repetitions: int, store: str) -> None:
    """One rank of torch.distributed's exchange, of as many bytes as that of Q, K and V; rank 0 prints."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    is_cuda = device == "cuda"
    if is_cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    backend = "nccl" if is_cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    heads = TENSORS * HEADS  # one tensor, which spares it two of the three collectives that DeepSpeed has

    def once(work) -> float:
        """Seconds of one turn: by events of the device, or by the clock of the host."""
        if not is_cuda:
            begun = time.perf_counter()
            for _ in range(TURNS):
                work()
            return (time.perf_counter() - begun) / TURNS
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(TURNS):
            work()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1000 / TURNS

    def measure(work) -> list[float]:
        for _ in range(WARM_UP):
            work()
        seconds = []
        for _ in range(repetitions):
            if is_cuda:
                torch.cuda.synchronize()
            dist.barrier()
            slowest = torch.tensor(once(work), dtype=torch.float64, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds.append(slowest.item())
        return seconds

    for all_tokens in tokens:
        own = all_tokens // ranks
        x = torch.rand(1, own, heads, HEAD_SIZE, dtype=torch.bfloat16, device=device)

        def work() -> None:
            send = x.view(1, own, ranks, heads // ranks, HEAD_SIZE).permute(2, 0, 1, 3, 4).contiguous()
            received = torch.empty_like(send)
            dist.all_to_all_single(received, send)
            received.permute(1, 3, 0, 2, 4).contiguous().view(1, heads // ranks, ranks * own, HEAD_SIZE)

        seconds = measure(work)
        if rank == 0:
            size = 2 * x.numel() * ranks
            measurement = {"what": "processes", "by": f"torch, {backend}", "ranks": ranks, "tokens": all_tokens}
            print(json.dumps(measurement | {"bytes": size, "seconds": seconds}), flush=True)
    dist.destroy_process_group()


def build() -> str:
    """The program of `gpu/main.rs`."""
    # The profile of everything else: torch-sys is not compiled for another one.
    command = ["cargo", "bench", "--package=ulysses", "--profile=dev", "--bench=gpu", "--no-run"]
    output = subprocess.run(
        [*command, "--message-format=json"],
        cwd=Path(__file__).resolve().parents[2],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    messages = (json.loads(line) for line in output.splitlines())
    return next(message["executable"] for message in messages if message.get("executable"))


def ended(process: subprocess.Popen) -> str:
    """Ends it, if it still runs, and gives what it has printed."""
    process.terminate()  # mpirun then ends its ranks, which hold the other end of the pipe
    try:
        return process.communicate(timeout=15)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return ""


class Run:
    """What was measured, and what could not be."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.program = chosen.program or build()
        self.measured: list[dict] = []
        self.failed: list[str] = []
        self.left_out: list[str] = []

    def program_alone(self, what: str, tokens: list[int], *more: str) -> None:
        self.take(what, [self.words(what, tokens, *more)])

    def words(self, what: str, tokens: list[int], *more: str) -> list[str]:
        numbers = ",".join(map(str, tokens))
        # Through the host a turn takes a hundred times as long, and varies less.
        repetitions = min(self.chosen.repetitions, 5) if "mpi" in more else self.chosen.repetitions
        common = ["--device", self.chosen.device, "--tokens", numbers, "--repetitions", str(repetitions)]
        return [self.program, what, *common, *more]

    def processes(self, means: str, ranks: int, tokens: list[int], variables: dict[str, str]) -> None:
        name = f"{means}, {ranks} ranks"
        # More ranks than cores, or as root in a container, are no reason to refuse here.
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
        self.take(name, [[*launcher, *self.words("processes", tokens, "--means", means)]], allowed | variables)

    def torch(self, ranks: int, tokens: list[int], variables: dict[str, str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            numbers = ",".join(map(str, tokens))
            common = ["--device", self.chosen.device, "--tokens", numbers, "--store", f"{folder}/store"]
            common += ["--repetitions", str(self.chosen.repetitions)]
            commands = [[sys.executable, __file__, "--rank", f"{rank}/{ranks}", *common] for rank in range(ranks)]
            self.take(f"torch, {ranks} ranks", commands, variables)

    def take(self, name: str, commands: list[list[str]], variables: dict[str, str] | None = None) -> None:
        """Runs the commands beside one another and takes the lines of the first."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (variables or {})
        started = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for command in commands
        ]
        try:
            printed, is_late = [process.communicate(timeout=LIMIT)[0] for process in started], False
        except subprocess.TimeoutExpired:
            printed, is_late = [ended(process) for process in started], True
        lines = [json.loads(line) for text in printed for line in text.splitlines() if line.startswith("{")]
        self.measured += lines
        for line in lines:
            print(json.dumps(line), file=sys.stderr)
        codes = [process.returncode for process in started]
        if is_late:
            self.failed.append(f"{name}: not done after {LIMIT} s")
        elif any(codes):
            self.failed.append(f"{name}: exit codes {codes}")

    def median(self, what: str, by: str, ranks: int, tokens: int) -> float | None:
        wanted = (what, by, ranks, tokens)
        for line in self.measured:
            if (line["what"], line["by"], line["ranks"], line["tokens"]) == wanted:
                return statistics.median(line["seconds"])
        return None

    def over(self, line: dict, by: str, ranks: int) -> str:
        """How many times as long it took as another of the same run."""
        other = self.median(line["what"], by, ranks, line["tokens"])
        return f"{statistics.median(line['seconds']) / other:.2f}" if other else ""


def measure(run: Run) -> None:
    chosen = run.chosen
    if chosen.tokens:
        exchanged = attended = chosen.tokens
    elif chosen.quick:
        exchanged, attended = [32768], [4096, 16384]
    else:
        exchanged, attended = [8192, 32768, 131072], [4096, 8192, 16384, 32768]
    run.program_alone("exchange", exchanged)
    run.program_alone("attention", attended, "--kernel", chosen.kernel)
    worlds = sorted({2, 4} | ({chosen.gpus} if chosen.gpus > 1 else set()))
    library = os.environ.get("ULYSSES_NCCL")
    for ranks in worlds[: 1 if chosen.quick else None]:
        run.processes("mpi", ranks, exchanged[:2], {})
        variables = {}
        if chosen.device == "cuda" and ranks > chosen.gpus:
            if library is None:
                run.left_out.append(f"NCCL, {ranks} ranks on {chosen.gpus} GPUs: give one from 2.32 on in ULYSSES_NCCL")
                continue
            variables["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
        if chosen.device == "cuda":
            run.processes("nccl", ranks, exchanged, variables)
        # The same NCCL for both: torch is linked with its own, and takes the one that is loaded before it.
        run.torch(ranks, exchanged, variables | ({"LD_PRELOAD": library} if library else {}))


def tables(run: Run) -> str:
    """All that was measured, as Markdown."""
    chosen = run.chosen
    text = [f"bfloat16, batch 1, {HEADS} heads of {HEAD_SIZE}, device {chosen.device}."]
    text.append("Times are medians; `x of` says how many times as long as that, in the same run.")
    text += ["", "Exchange of Q, K and V, ranks as threads on one GPU:", ""]
    text += ["| ranks | tokens | MiB | ms | GB/s | x of the copy |", "| --- | --- | --- | --- | --- | --- |"]
    for line in lines_of(run, "exchange"):
        name = "copy within the GPU" if line["by"] == "copy" else str(line["ranks"])
        text.append(f"| {name} | {sizes(line)} | {run.over(line, 'copy', 1)} |")
    dense = f"dense, {chosen.kernel}"
    text += ["", "Attention, causal, forward and backward, ranks as threads on one GPU:", ""]
    text += [f"| ranks | tokens | ms | x of {dense} |", "| --- | --- | --- | --- |"]
    for line in lines_of(run, "attention"):
        name = line["by"] if line["by"] == dense else str(line["ranks"])
        text.append(f"| {name} | {line['tokens']} | {milliseconds(line)} | {run.over(line, dense, 1)} |")
    rival = "torch, nccl" if chosen.device == "cuda" else "torch, gloo"
    text += ["", f"Exchange of Q, K and V, ranks as processes, number of GPUs {chosen.gpus}:", ""]
    text += [f"| by | ranks | tokens | MiB | ms | GB/s | x of {rival} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for line in lines_of(run, "processes"):
        over = run.over(line, rival, line["ranks"])
        text.append(f"| {line['by']} | {line['ranks']} | {sizes(line)} | {over} |")
    if missing := run.failed + run.left_out:
        text += ["", "Not measured:", "", *(f"- {words}" for words in missing)]
    return "\n".join(text) + "\n"


def lines_of(run: Run, what: str) -> list[dict]:
    return [line for line in run.measured if line["what"] == what]


def milliseconds(line: dict) -> str:
    return f"{statistics.median(line['seconds']) * 1000:.3f}"


def sizes(line: dict) -> str:
    rate = line["bytes"] / statistics.median(line["seconds"]) / 1e9
    return f"{line['tokens']} | {line['bytes'] / 2**20:.0f} | {milliseconds(line)} | {rate:.1f}"


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only to rehearse")
    arguments.add_argument("--gpus", type=int, default=1, help="how many there are")
    arguments.add_argument("--quick", action="store_true", help="fewer sizes and ranks")
    arguments.add_argument("--tokens", type=numbers, help="these, in place of all")
    arguments.add_argument("--repetitions", type=int, default=15)
    arguments.add_argument("--kernel", default="flash", help="of attention, dense and of the reference")
    arguments.add_argument("--program", help="gpu/main.rs, built already")
    arguments.add_argument("--json", type=Path, help="write what was measured into this file")
    arguments.add_argument("--rank", help=argparse.SUPPRESS)
    arguments.add_argument("--store", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.rank:
        rank, ranks = map(int, chosen.rank.split("/"))
        all_to_all(rank, ranks, chosen.device, chosen.tokens, chosen.repetitions, chosen.store)
        return 0
    run = Run(chosen)
    measure(run)
    table = tables(run)
    print(table)
    if chosen.json:
        result = {"measured": run.measured, "failed": run.failed, "left_out": run.left_out, "table": table}
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
