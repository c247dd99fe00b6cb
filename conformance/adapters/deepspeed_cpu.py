"""Starts DeepSpeed on a CPU with gloo, for the two adapters of its attention classes. Import it before deepspeed."""

import importlib
import os

# Without it, DeepSpeed takes the accelerator it finds, and the ranks would not run on the session's device.
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups

import ulysses_kit

# The backend compiles a shared-memory collective in C++ at its start. It wants a compiler, takes a minute, and
# serves all-reduce alone, which sequence-parallel attention does not use. (The attribute deepspeed.comm.torch is
# PyTorch itself; the module of that name is found by import alone.)
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def setup(rank: ulysses_kit.Rank) -> torch.distributed.ProcessGroup:
    """Joins the ranks; returns the sequence-parallel group, made by DeepSpeed's own `parallel_state_sp`."""
    if rank.device.type != "cpu":
        raise ValueError(f"this adapter runs on a CPU, the session wants {rank.device}")
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=rank.init_method, rank=rank.rank, world_size=rank.world
    )
    if rank.world == 1:  # parallel_state_sp refuses a group of one, the attention classes do not
        return torch.distributed.group.WORLD
    parallel_state_sp.initialize_sequence_parallel(rank.world)
    groups.mpu = parallel_state_sp  # what deepspeed.initialize(mpu=...) does; the uneven split asks it for the rank
    return parallel_state_sp.get_sequence_parallel_group()
