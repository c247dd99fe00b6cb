"""Starts DeepSpeed on the session's device, with gloo, for its adapters. Import it before deepspeed."""

import functools
import importlib
import os

import ulysses_kit

# Without it, DeepSpeed takes the accelerator it finds, and the ranks would not run on the session's device. Who uses
# this outside of a session says it himself.
if "DS_ACCELERATOR" not in os.environ:
    os.environ["DS_ACCELERATOR"] = ulysses_kit.session_device().type

import deepspeed
import torch
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups

# The backend compiles a shared-memory collective in C++ at its start. It wants a compiler, takes a minute, and
# serves all-reduce alone, which sequence-parallel attention does not use. (The attribute deepspeed.comm.torch is
# PyTorch itself; the module of that name is found by import alone.)
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def setup(rank: ulysses_kit.Rank) -> torch.distributed.ProcessGroup:
    """Joins the ranks; returns the sequence-parallel group, made by DeepSpeed's own `parallel_state_sp`."""
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=rank.init_method, rank=rank.rank, world_size=rank.world
    )
    if rank.world == 1:  # parallel_state_sp refuses a group of one, the attention classes do not
        return torch.distributed.group.WORLD
    parallel_state_sp.initialize_sequence_parallel(rank.world)
    groups.mpu = parallel_state_sp  # what deepspeed.initialize(mpu=...) does; the uneven split asks it for the rank
    return parallel_state_sp.get_sequence_parallel_group()


def count_as_zero_does(tiled: ulysses_kit.Tiled) -> ulysses_kit.Tiled:
    """`tiled`, of which only those announcements of a gradient are counted that ZeRO heeds.

    DeepSpeed's tiled functions run backward of each tile by itself, and announce a weight's gradient every time. To
    ZeRO they say by `ds_grad_is_ready` which time is the last (stages 1 and 2: stage_1_and_2.py, line 1431; stage 3:
    stage3.py, line 1588). DistributedDataParallel and FSDP do not ask.
    """

    @functools.wraps(tiled)
    def counted(hidden: torch.Tensor, case: ulysses_kit.TiledCase) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if not case.signals:
            return tiled(hidden, case)
        signals = dict.fromkeys(case.signals, 0)

        def count(name: str, weight: torch.Tensor) -> None:
            signals[name] += getattr(weight, "ds_grad_is_ready", True)

        for name in signals:  # before it computes: TiledFusedLogitsLoss runs backward in its forward
            case.weights[name].register_post_accumulate_grad_hook(functools.partial(count, name))
        out = tiled(hidden, case)
        if not out.requires_grad:
            return out  # of which the kit says that it has no graph
        out.backward(case.dout)
        inputs = {"hidden": hidden, **case.weights}
        return out, *(inputs[name].grad for name in case.gradients), torch.tensor(list(signals.values()))

    return counted
