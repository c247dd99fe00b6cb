"""What the check runs, in turn: each step a command with a time limit, and why a step is left out."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from machine import Machine

# A CPU takes longer for what is to be shown on a GPU.
REHEARSAL = 5
PARTS = ("kernels", "tests", "threads", "mpi", "nccl", "kernel", "adapters", "benchmark")
WORLDS = (1, 2, 4)
# What an adapter needs of the Python beside torch.
ADAPTERS = {
    "torch-plain": ("safetensors",),
    "torch-plain-llama": ("safetensors",),
    "deepspeed-distributed-attention": ("safetensors", "deepspeed"),
    "deepspeed-ulysses-hf": ("safetensors", "deepspeed", "transformers"),
    "deepspeed-tiled": ("safetensors", "deepspeed"),
    "deepspeed-tiled-compute": ("safetensors", "deepspeed"),
    "deepspeed-llama": ("safetensors", "deepspeed", "transformers"),
}


@dataclass
class Step:
    """One command. Its log is named after it."""

    part: str
    name: str
    command: list[str]
    limit: int  # seconds
    variables: dict[str, str] = field(default_factory=dict)
    left_out: str | None = None  # why it is not run
    verdicts: Path | None = None  # of `run --json`
    measured: Path | None = None  # of gpu.py --json


@dataclass
class Choice:
    """What of it all is wanted, and where things are."""

    folder: Path  # of the programs
    work: Path  # for what steps write
    device: str
    parts: tuple[str, ...]
    is_quick: bool

    def worlds(self) -> list[int]:
        return [2] if self.is_quick else list(WORLDS)

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def run(self, part: str, name: str, implementation: str, worlds: list[int], limit: int, *more: str, **rest) -> Step:
        verdicts = self.work / f"{file_name(name)}.jsonl"
        command = [self.program("ulysses-conformance"), "run", "--implementation", implementation]
        command += ["--device", self.device, "--world", ",".join(map(str, worlds)), "--json", str(verdicts), *more]
        return Step(part, name, command, limit, verdicts=verdicts, **rest)


def file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def steps(choice: Choice, machine: Machine):
    """Every step of the parts that are wanted; those of `kernel` follow from what the first has printed."""
    list_kernels = [choice.program("ulysses-conformance"), "kernels", "--device", choice.device]
    makers = {
        "kernels": lambda: [Step("kernels", "kernels", list_kernels, 90)],
        "tests": lambda: tests(choice),
        "threads": lambda: [choice.run("threads", "threads", "reference", choice.worlds(), 240)],
        "mpi": lambda: [choice.run("mpi", "MPI", "reference-mpi", choice.worlds(), 240)],
        "nccl": lambda: nccl(choice, machine),
        "kernel": lambda: each_kernel(choice),
        "adapters": lambda: adapters(choice, machine),
        "benchmark": lambda: [benchmark(choice, machine)],
    }
    for part in PARTS:
        for step in makers[part]() if part in choice.parts else ():
            step.limit *= REHEARSAL if choice.device == "cpu" else 1
            yield step


def tests(choice: Choice) -> list[Step]:
    if choice.device == "cpu":
        return [Step("tests", "CUDA test suites", [], 0, left_out="they are for a GPU")]
    # The simulation has been tested where there is a compiler; and what the other parts run need not be run twice.
    skipped = ["all_on_simulated_devices"]
    skipped += ["the_reference_", "every_kernel_there_is_is_right", "plain_torch"] if choice.is_quick else []
    words = [word for name in skipped for word in ("--skip", name)]
    programs = sorted((choice.folder / "bin").glob("test-cuda-*"))
    return [Step("tests", program.name, [str(program), *words], 240) for program in programs] or [
        Step("tests", "CUDA test suites", [], 0, left_out="there are none in the folder")
    ]


def nccl(choice: Choice, machine: Machine) -> list[Step]:
    """As many ranks as GPUs, and more where an NCCL allows it."""
    if choice.device == "cpu":
        return [Step("nccl", "NCCL", [], 0, left_out="NCCL moves memory of GPUs alone")]
    own = 1 if ":" in choice.device else max(machine.gpus, 1)
    gpus = "1 GPU" if own == 1 else f"{own} GPUs"
    variables = {"ULYSSES_NCCL": machine.sharing_nccl} if machine.sharing_nccl else {}
    taken = [choice.run("nccl", f"NCCL, P = {own} on {gpus}", "reference-nccl", [own], 180, variables=variables)]
    for world in (world for world in choice.worlds() if world > own):
        name = f"NCCL, P = {world} on {gpus}"
        if machine.sharing_nccl is None:
            reason = "no NCCL from 2.32 on was found: give the path of its libnccl.so.2 in ULYSSES_NCCL"
            taken.append(Step("nccl", name, [], 0, left_out=reason))
            continue
        shared = variables | {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
        taken.append(choice.run("nccl", name, "reference-nccl", [world], 120, variables=shared))
    return taken


def each_kernel(choice: Choice) -> list[Step]:
    """Attention by each kernel that the device offers by itself."""
    log = choice.work / "kernels.log"
    if not log.exists():
        return [Step("kernel", "each kernel", [], 0, left_out="the part `kernels` says which there are")]
    rows = re.findall(r"^\| ([a-z-]+) +\|(.+)\|$", log.read_text(encoding="utf-8"), re.MULTILINE)
    offered = [name for name, cells in rows if name not in ("kernel", "sdpa") and re.search("yes|no groups", cells)]
    filters = ["--filter", "attention/"] + (["--filter=-bf16-"] if choice.is_quick else [])
    return [
        choice.run("kernel", f"kernel {name}", "reference", [2], 120, "--kernel", name, *filters) for name in offered
    ] or [Step("kernel", "each kernel", [], 0, left_out="the part `kernels` found none")]


def adapters(choice: Choice, machine: Machine) -> list[Step]:
    taken = []
    for name, needed in ADAPTERS.items():
        missing = [package for package in needed if machine.packages.get(package) is None]
        worlds = [2] if choice.is_quick else [1, 2]
        # What this release of DeepSpeed is known to get wrong is no news.
        known = choice.folder / f"known/deepspeed-{machine.packages.get('deepspeed')}.toml"
        flags = ["--known", str(known)] if "deepspeed" in needed and known.exists() else []
        step = choice.run("adapters", name, name, worlds, 150, *flags)
        if missing:
            step.left_out = f"not installed: {', '.join(missing)}"
        taken.append(step)
    return taken


def benchmark(choice: Choice, machine: Machine) -> Step:
    measured = choice.work / "benchmark.json"
    command = [machine.python, str(choice.folder / "gpu.py"), "--program", choice.program("gpu-benchmark")]
    command += ["--device", "cpu" if choice.device == "cpu" else "cuda", "--gpus", str(max(machine.gpus, 1))]
    command += ["--json", str(measured)]
    if choice.device == "cpu":  # A rehearsal shows that it runs; no figure of it is worth anything.
        command += ["--tokens", "64", "--repetitions", "2", "--kernel", "sdpa"]
    elif choice.is_quick:
        command += ["--quick", "--repetitions", "7"]
    variables = {"ULYSSES_NCCL": machine.sharing_nccl} if machine.sharing_nccl else {}
    return Step("benchmark", "benchmark", command, 300, variables, measured=measured)
