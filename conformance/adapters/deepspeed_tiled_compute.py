"""deepspeed's sequence_tiled_compute, unmodified: the function that is to do for any forward.

Of what every tile sees whole it says that one key alone "requires grads", so that is not claimed. A mean over tokens
is made of its sum, since its own mean is that of the tiles' means.
"""

import deepspeed_start  # before deepspeed
from deepspeed.runtime.sequence_parallel.ulysses_sp import sequence_tiled_compute
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

import ulysses_kit


def tiled(hidden: Tensor, case: ulysses_kit.TiledCase) -> Tensor:
    weights = case.weights
    # What a tile gives, and what becomes of all that tiles give. One number of each is stacked along dimension 0.
    reductions = {"mean-of-tiles": ("mean", "mean"), "none": ("none", None)}
    of_tile, over_tiles = reductions.get(case.reduction, ("sum", "sum"))

    def mlp(hidden: Tensor) -> Tensor:
        return (silu(hidden @ weights["gate"].T) * (hidden @ weights["up"].T)) @ weights["down"].T

    def affine(hidden: Tensor) -> Tensor:
        return hidden @ weights["weight"].T

    def nll(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = (hidden @ weights["head"].T).to(case.dout.dtype).flatten(0, 1)
        loss = cross_entropy(logits, labels.flatten(), ignore_index=case.ignore_index, reduction=of_tile)
        return loss.view_as(labels) if of_tile == "none" else loss

    is_one = case.function == "nll" and over_tiles is not None
    out = sequence_tiled_compute(
        {"mlp": mlp, "affine": affine, "nll": nll}[case.function],
        hidden.shape[1],
        case.tiles,
        {"hidden": hidden} if case.labels is None else {"hidden": hidden, "labels": case.labels},
        {},
        "hidden",
        list(weights.values()),
        output_unshard_dimension=0 if is_one else 1,
        output_reduction=over_tiles if is_one else None,
    )
    if case.reduction == "mean":
        out = out / (case.labels != case.ignore_index).sum().clamp(min=1)
    return out


if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="deepspeed-tiled-compute",
        version=deepspeed_start.deepspeed.__version__,
        features=[
            *("dtype-f64", "dtype-f32", "dtype-bf16", "dtype-f16", "batch"),
            *("tiled-mlp", "tiled-affine", "tiled-mean", "tiled-sum", "tiled-none", "tiled-mean-of-tiles"),
            "gradient-signals",
        ],
        setup=deepspeed_start.setup,
        tiled=deepspeed_start.count_as_zero_does(tiled),
        libraries=["deepspeed"],
    )
