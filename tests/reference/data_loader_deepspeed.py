"""What DeepSpeed's own data loader adapter serves to each of two ranks.

Reads from standard input, as JSON, each rank's batches: for each entry its
name, its dtype and its values. Writes to standard output what each rank was
served, in order, as JSON.
"""

import importlib
import json
import multiprocessing
import os
import sys
import tempfile


def serve(rank, world, batches, folder):
    # DeepSpeed prints on standard output.
    os.dup2(2, 1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

    # A collective in C++ that would be compiled at the start, and that the adapter does not use.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    store = f"file://{folder}/store"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=store, rank=rank, world_size=world)
    own = [
        {name: torch.tensor(values, dtype=getattr(torch, dtype)) for name, (dtype, values) in batch.items()}
        for batch in batches[rank]
    ]
    adapter = UlyssesSPDataLoaderAdapter(own, rank, dist.group.WORLD, world, torch.device("cpu"))
    epochs = []
    for _ in range(2):
        epochs.append([{name: t.tolist() for name, t in shard.items()} for shard in adapter])
    with open(f"{folder}/{rank}", "w") as file:
        json.dump({"len": len(adapter), "epochs": epochs}, file)
    dist.destroy_process_group()


def main():
    batches = json.load(sys.stdin)
    world = len(batches)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=serve, args=(rank, world, batches, folder), daemon=True) for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
        if any(rank.exitcode != 0 for rank in ranks):
            sys.exit(f"exit codes {[rank.exitcode for rank in ranks]}")
        served = []
        for rank in range(world):
            with open(f"{folder}/{rank}") as file:
                served.append(json.load(file))
    json.dump(served, sys.stdout)


main()
