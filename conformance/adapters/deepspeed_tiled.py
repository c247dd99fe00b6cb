"""What deepspeed has around attention for long sequences, unmodified: TiledMLP, TiledFusedLogitsLoss, and
UlyssesSPDataLoaderAdapter.

TiledFusedLogitsLoss knows a sum over tiles, and a mean of the tiles' means. For a mean over tokens its documentation
recommends "to use "sum" instead of "mean" and perform the balanced mean to the output", which is done here.

The data loader's batches have position ids, as it wants them: those of rows that are not packed count from 0. It
shifts labels across documents, and that is claimed. Not claimed are ranks with other numbers of batches, of which it
says nothing.
"""

import deepspeed_start  # before deepspeed
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP, UlyssesSPDataLoaderAdapter
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from torch.utils.data import DataLoader

import ulysses_kit

GROUP = None


def setup(rank: ulysses_kit.Rank) -> None:
    global GROUP
    GROUP = deepspeed_start.setup(rank)


def mlp(case: ulysses_kit.TiledCase, x: Tensor) -> Tensor:
    weights = case.weights
    return (silu(x @ weights["gate"].T) * (x @ weights["up"].T)) @ weights["down"].T


def loss(case: ulysses_kit.TiledCase, x: Tensor, y: Tensor) -> Tensor:
    logits = (x @ case.weights["head"].T).to(case.dout.dtype)
    of_tile = "mean" if case.reduction == "mean-of-tiles" else "sum"
    return cross_entropy(logits, y, ignore_index=case.ignore_index, reduction=of_tile)


def tiled(hidden: Tensor, case: ulysses_kit.TiledCase) -> Tensor:
    weights = list(case.weights.values())
    if case.function == "mlp":
        return TiledMLP.apply(mlp, case, hidden, case.tiles, weights)
    over_tiles = "mean" if case.reduction == "mean-of-tiles" else "sum"
    out = TiledFusedLogitsLoss.apply(loss, case, hidden, case.labels, None, case.tiles, weights, over_tiles)
    if case.reduction == "mean":
        out = out / (case.labels != case.ignore_index).sum().clamp(min=1)
    return out


def batch(batches: list[dict[str, Tensor]], case: ulysses_kit.BatchCase) -> list[list[dict[str, Tensor]]]:
    rows = []
    for entries in batches:
        ids = entries["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        rows.append({"position_ids": positions.contiguous(), **entries})
    loader = UlyssesSPDataLoaderAdapter(
        DataLoader(rows, batch_size=None), case.rank, GROUP, case.world, batches[0]["input_ids"].device
    )
    return [list(loader) for _ in range(case.stream["epochs"])]


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="deepspeed-tiled",
        version=deepspeed_start.deepspeed.__version__,
        features=[
            *("dtype-f64", "dtype-f32", "dtype-bf16", "dtype-f16", "batch"),
            *("tiled-mlp", "tiled-mean", "tiled-sum", "tiled-mean-of-tiles", "gradient-signals"),
            *("batch-stream", "batch-targets-across-documents"),
        ],
        setup=setup,
        tiled=deepspeed_start.count_as_zero_does(tiled),
        batch=batch,
        libraries=["deepspeed"],
    )
