"""What this machine has: the torch whose libtorch the programs load, an MPI, NCCL, GPUs, and their versions."""

import ctypes.util
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# From this NCCL on, NCCL_MULTI_RANK_GPU_ENABLE=1 allows several ranks on one GPU.
NCCL_THAT_SHARES = 23200

# What the Python has, asked in a process of its own: a torch that does not start is no end of the check.
ASK_PYTHON = """
import importlib.metadata, json, pathlib, sys, torch
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
found = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
         "lib": str(pathlib.Path(torch.__file__).parent / "lib"), "gpus": [],
         "packages": {name: version(name) for name in ("safetensors", "transformers", "deepspeed")}}
if torch.version.cuda:
    found["cudnn"] = torch.backends.cudnn.version()
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found["gpus"].append({"name": gpu.name, "bytes": gpu.total_memory, "compute": f"{gpu.major}.{gpu.minor}"})
print(json.dumps(found))
"""
ASK_NCCL = """
import ctypes, sys
version = ctypes.c_int()
ctypes.CDLL(sys.argv[1]).ncclGetVersion(ctypes.byref(version))
print(version.value)
"""


class Missing(Exception):
    """What the check cannot do without, in a sentence that says what to do."""


@dataclass
class Machine:
    """This machine, as programs are started on it."""

    about: dict  # what goes into the result file
    python: str
    packages: dict  # version by name, None where it is not installed
    gpus: int
    libraries: list[str]  # folders for the loader, before its own
    mpi: Path | None  # the folder's own Open MPI
    sharing_nccl: str | None  # a library of NCCL that allows several ranks on one GPU

    def environment(self) -> dict[str, str]:
        """The variables of every program that is started."""
        environment = dict(os.environ)
        environment.pop("ULYSSES_EXCHANGE", None)
        earlier = [environment[name] for name in ("LD_LIBRARY_PATH",) if environment.get(name)]
        environment["LD_LIBRARY_PATH"] = ":".join(self.libraries + earlier)
        environment["ULYSSES_PYTHON"] = self.python
        environment["PYTHONUNBUFFERED"] = "1"
        environment["OMPI_ALLOW_RUN_AS_ROOT"] = environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
        if self.mpi:
            environment["PATH"] = f"{self.mpi / 'bin'}:{environment.get('PATH', os.defpath)}"
            environment["OPAL_PREFIX"] = str(self.mpi)
            # All ranks are on this host: no launcher for others is looked for, and no network.
            environment |= {"OMPI_MCA_plm": "isolated", "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,vader"}
            # In a container the kernel often forbids one process to read another's memory.
            environment["OMPI_MCA_btl_vader_single_copy_mechanism"] = "none"
        return environment


def look(folder: Path, python: str) -> Machine:
    """This machine, for the programs in `folder`."""
    programs = json.loads((folder / "programs.json").read_text(encoding="utf-8"))
    found = ask(python, ASK_PYTHON)
    if found is None:
        raise Missing(f"{python} cannot import torch: give --python one that has torch {programs['torch']}")
    torch = json.loads(found)
    if torch["torch"].split("+")[0] != programs["torch"]:
        needed = f"the programs need {programs['torch']}: give --python another"
        raise Missing(f"{python} has torch {torch['torch']}, and {needed}")
    glibc = platform.libc_ver()[1]
    if version(glibc) < version(programs["glibc"]):
        raise Missing(f"glibc here is {glibc}, and the programs need {programs['glibc']}: make them on an older system")
    mpi = folder / "openmpi" if (folder / "openmpi/bin/mpirun").exists() else None
    libraries = [torch["lib"]] + ([str(mpi / "lib")] if mpi else [])
    found_nccl = nccl_libraries(folder, Path(torch["lib"]))
    sharing = next((path for path, number in found_nccl.items() if number >= NCCL_THAT_SHARES), None)
    machine = Machine({}, python, torch["packages"], len(torch["gpus"]), libraries, mpi, sharing)
    machine.about = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "gpus": [f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB, compute {gpu['compute']}" for gpu in torch["gpus"]],
        "driver": nvidia_driver(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "system": f"{system()}, kernel {platform.release()}, glibc {glibc}",
        "python": torch["python"],
        "torch": torch["torch"],
        "cuda": torch["cuda"],
        "cudnn": torch.get("cudnn"),
        "nccl of torch": torch.get("nccl"),
        "nccl that was found": found_nccl,
        "mpi": mpi_version(machine),
        "packages": torch["packages"],
        "programs": programs,
    }
    return machine


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def ask(python: str, program: str, *arguments: str) -> str | None:
    """What a program in Python prints; None where it fails."""
    try:
        asked = subprocess.run(
            [python, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=180
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return None
    if asked.returncode != 0:
        print(asked.stderr.strip().rpartition("\n")[2], file=sys.stderr)
        return None
    return asked.stdout.strip().rpartition("\n")[2]


def nccl_libraries(folder: Path, torch_lib: Path) -> dict[str, int]:
    """The NCCL libraries that are where one looks, with their versions; that of ULYSSES_NCCL alone if it is set."""
    if chosen := os.environ.get("ULYSSES_NCCL"):
        places = [chosen]
    else:
        beside = [folder / "nccl/libnccl.so.2", *torch_lib.parents[1].glob("nvidia/nccl/lib/libnccl.so.2")]
        places = [str(path) for path in beside if path.exists()]
        places += filter(None, [ctypes.util.find_library("nccl")])
    versions = {path: ask(sys.executable, ASK_NCCL, path) for path in places}
    return {path: int(number) for path, number in versions.items() if number}


def nvidia_driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(query, stdout=subprocess.PIPE, text=True)
    return asked.stdout.splitlines()[0].strip() if asked.stdout.strip() else None


def system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def processor() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return names[0] if names else platform.machine()


def mpi_version(machine: Machine) -> str:
    environment = machine.environment()
    mpirun = shutil.which("mpirun", path=environment["PATH"])
    if mpirun is None:
        return "none: there is no mpirun in the folder or on the PATH"
    asked = subprocess.run([mpirun, "--version"], env=environment, stdout=subprocess.PIPE, text=True)
    whose = "of the folder" if machine.mpi else mpirun
    return f"{asked.stdout.partition(chr(10))[0]}, {whose}"
