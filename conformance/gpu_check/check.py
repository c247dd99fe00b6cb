"""Checks everything of this project that needs a GPU, and writes down what was found.

    python3 check.py [--out FOLDER] [--only kernels,mpi,...] [--quick] [--minutes 9]

It needs one or more NVIDIA GPUs and a Python from 3.11 on with the torch of CUDA that the programs were built for; no
Rust, no network. Every step runs with a time limit, none ends the check, and every log is kept. At its end there are
a table, and files DATE-HARDWARE.md, .json and -logs.tar.xz in the folder (default: $OUT, else gpu-results). They are
written anew after each step, so that an end from outside loses one step.

`--device cpu` rehearses all that a CPU can do, into files that say so.

Exit codes: 0 every step that was run ended well, 1 some did not or none was run, 2 the command line, 5 something is
missing here.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.dont_write_bytecode = True  # The folder stays as it was made.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
import results
import steps

FOLDER = Path(__file__).resolve().parent
GRACE = 15  # seconds in which a program that is told to end may end its ranks
LEAST = 15  # seconds, or a step is not begun


class Check:
    """The steps that were taken, and where that is written down."""

    def __init__(self, choice: steps.Choice, here: machine.Machine, out: Path, minutes: float | None) -> None:
        self.choice, self.here = choice, here
        self.begun = time.monotonic()
        self.end = self.begun + 60 * minutes if minutes else None
        self.taken: list[dict] = []
        hardware = here.about["gpus"][0].partition(",")[0] if here.about["gpus"] else here.about["processor"]
        count = f"{here.gpus}x-" if here.gpus > 1 else ""
        name = f"{here.about['date'][:10]}-{count}{steps.file_name(hardware)}"
        self.file = out / (f"rehearsal-{name}" if self.is_rehearsal() else name)

    def is_rehearsal(self) -> bool:
        return self.choice.device == "cpu"

    def take(self, step: steps.Step) -> None:
        """Runs one step, if there is still time, and writes everything down."""
        left = self.end - time.monotonic() if self.end else step.limit
        if not step.left_out and left < LEAST:
            step.left_out = "the time is up"
        entry = asdict(step) | {"exit_code": None, "timed_out": False, "seconds": 0.0, "tests": None, "verdicts": None}
        entry |= {"printed": "", "last_words": "", "shown": self.shown(step.command)}
        if not step.left_out:
            print(f"{step.part}: {step.name} ...", end=" ", flush=True)
            self.run(step, min(step.limit, left), entry)
            print(results.ended(entry), f"{entry['seconds']:.1f} s", results.outcome(entry), flush=True)
        self.taken.append({key: str(value) if isinstance(value, Path) else value for key, value in entry.items()})
        self.write()

    def run(self, step: steps.Step, limit: float, entry: dict) -> None:
        log = self.choice.work / f"{steps.file_name(step.name)}.log"
        begun = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                step.command,
                env=self.here.environment() | step.variables,
                cwd=self.choice.work,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                entry["timed_out"] = True
            finally:
                end_group(process)
        entry["seconds"] = time.monotonic() - begun
        entry["exit_code"] = process.returncode
        entry["verdicts"] = results.verdicts(step.verdicts)
        entry["tests"] = results.tests(log) if step.part == "tests" else None
        if process.returncode != 0:
            entry["last_words"] = results.last_words(log)
        if step.part == "kernels":
            entry["printed"] = log.read_text(encoding="utf-8", errors="replace").strip()
        if step.measured and step.measured.exists():
            entry["printed"] = json.loads(step.measured.read_text(encoding="utf-8"))["table"]

    def shown(self, command: list[str]) -> str:
        """As it is written down: from within the folder, and with its files where the logs are."""
        return shlex.join(command).replace(f"{FOLDER}/", "").replace(str(self.choice.work), "logs")

    def write(self) -> None:
        result = {
            "rehearsal": self.is_rehearsal(),
            "machine": self.here.about,
            "seconds": time.monotonic() - self.begun,
            "steps": self.taken,
        }
        for step in self.taken:
            if step["measured"] and Path(step["measured"]).exists():
                step["measurements"] = json.loads(Path(step["measured"]).read_text(encoding="utf-8"))["measured"]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = {".json": json.dumps(result, indent=1) + "\n", ".md": results.markdown(result)}
        for suffix, content in text.items():
            Path(f"{self.file}{suffix}").write_text(content, encoding="utf-8")
        with tarfile.open(f"{self.file}-logs.tar.xz", "w:xz") as archive:
            archive.add(self.choice.work, "logs")

    def is_well(self) -> bool:
        """Whether every step that was run ended well, and there was one."""
        codes = [step["exit_code"] for step in self.taken if not step["left_out"]]
        return bool(codes) and not any(codes)


def end_group(process: subprocess.Popen) -> None:
    """Ends a program that still runs, and what it has left behind."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(steps.PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}: there are {', '.join(steps.PARTS)}")
    return names


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=f"parts: {', '.join(steps.PARTS)}"
    )
    arguments.add_argument("--out", type=Path, help="the folder for the result (default: $OUT, else gpu-results)")
    arguments.add_argument(
        "--only", type=parts, default=steps.PARTS, metavar="PARTS", help="these parts, with commas between"
    )
    arguments.add_argument("--quick", action="store_true", help="two ranks, fewer kernels' cases, a short benchmark")
    arguments.add_argument("--minutes", type=float, help="begin nothing, and let nothing run, after so many")
    arguments.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to rehearse")
    arguments.add_argument("--python", default=sys.executable, help="the Python that has torch (default: this one)")
    return arguments.parse_args()


def main() -> int:
    chosen = parse()
    # Who ends the check ends the programs that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = chosen.out or Path(os.environ.get("OUT") or "gpu-results")
    if chosen.device == "cpu" and "docs" in out.absolute().parts:
        print("error: a rehearsal is no result: give --out a folder outside docs", file=sys.stderr)
        return 2
    if not re.fullmatch(r"cpu|cuda(:\d+)?", chosen.device):
        print(f"error: --device {chosen.device} is neither cpu, cuda nor cuda:N", file=sys.stderr)
        return 2
    try:
        here = machine.look(FOLDER, chosen.python)
    except machine.Missing as missing:
        print(f"error: {missing}", file=sys.stderr)
        return 5
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        choice = steps.Choice(FOLDER, Path(work), chosen.device, chosen.only, chosen.quick)
        if complaint := no_device(choice, here):
            print(f"{complaint}\n--device cpu rehearses what a CPU can do", file=sys.stderr)
            return 5
        check = Check(choice, here, out, chosen.minutes)
        for step in steps.steps(choice, here):
            check.take(step)
    print(f"\n{Path(f'{check.file}.md').read_text(encoding='utf-8')}\n{check.file}.md")
    return 0 if check.is_well() else 1


def no_device(choice: steps.Choice, here: machine.Machine) -> str | None:
    """What the program says where the device is not there, or where it does not start."""
    command = [choice.program("ulysses-conformance"), "kernels", "--device", choice.device]
    try:
        tried = subprocess.run(command, env=here.environment(), capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "error: the device did not answer within three minutes"
    return tried.stderr.strip() or f"error: exit code {tried.returncode}" if tried.returncode else None


if __name__ == "__main__":
    sys.exit(main())
