"""Ulysses sequence parallelism in plain PyTorch: the example for implementers, and the harness' own baseline.

Every rank owns s = S/P tokens of all heads. Attention wants all tokens of some heads, so an all-to-all before it
trades heads for tokens, and one behind it trades them back. Query heads and KV heads are cut in the same order,
hence a query head meets its KV head on one rank. Not here: lengths or head counts that the ranks do not divide,
masks other than full and causal.

The loss over the tokens of all ranks is one number, of which each rank takes the gradient for its own tokens.

Around it is what a training step does beside attention: shards of batches, the mesh of ranks, and functions of long
sequences a tile at a time. Rows are cut into contiguous shards alone.
"""

import functools
from typing import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

import ulysses_kit


class Exchange(torch.autograd.Function):
    """All-to-all over the leading dimension, [P, ...]: block r goes to rank r, block r of the result is from rank r.

    As a matrix over all ranks it is a symmetric permutation: its adjoint is the same exchange, with no scale.
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, ctx.group), None


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Attention over the tokens of all ranks: q [B,s,Hq,D], k [B,s,Hkv,D], v [B,s,Hkv,V], result [B,s,Hq,V]."""
    world = dist.get_world_size(group)
    query_heads, kv_heads = q.shape[2], k.shape[2]
    if query_heads % world != 0:
        raise ValueError(f"{query_heads} query heads do not divide over {world} ranks")
    if kv_heads % world != 0 and world % kv_heads != 0:
        raise ValueError(f"neither do {kv_heads} KV heads divide over {world} ranks, nor the ranks over the heads")
    if kv_heads < world:  # neighbouring ranks share a KV head: k0 k0 k1 k1, not k0 k1 k0 k1
        k, v = (x.repeat_interleave(world // kv_heads, dim=2) for x in (k, v))

    # [B,s,H,D] -> [B,s,P,H/P*D]: block p of each holds the heads of rank p, so one exchange serves all three
    by_rank = [x.unflatten(2, (world, -1)).flatten(3) for x in (q, k, v)]
    received = Exchange.apply(torch.cat(by_rank, dim=3).movedim(2, 0), group)  # [P,B,s,n], P by source
    whole = received.movedim(0, 1).flatten(1, 2)  # [B,S,n]: ranks own their tokens in rank order
    parts = whole.split([x.shape[3] for x in by_rank], dim=2)
    q, k, v = (part.unflatten(2, (-1, x.shape[3])).transpose(1, 2) for part, x in zip(parts, (q, k, v)))
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)  # [B,Hq/P,S,V]

    by_rank = out.transpose(1, 2).unflatten(1, (world, -1))  # [B,P,s,Hq/P,V]
    received = Exchange.apply(by_rank.movedim(1, 0), group)  # [P,B,s,Hq/P,V]
    return received.movedim(0, 2).flatten(2, 3)


def setup(rank: ulysses_kit.Rank) -> None:
    # gloo takes tensors of a GPU too, through the host, and ranks may share one
    dist.init_process_group("gloo", init_method=rank.init_method, rank=rank.rank, world_size=rank.world)


def attention(q: Tensor, k: Tensor, v: Tensor, case: ulysses_kit.Case) -> Tensor:
    if len(set(case.shard_lengths)) > 1:  # seen from the lengths of all ranks: refused by all, before any waits
        raise ulysses_kit.Unsupported(f"shards of unequal lengths {case.shard_lengths}")
    if case.documents:  # it reads no position ids, and would have tokens attend across documents without a word
        raise ulysses_kit.Unsupported("packed documents")
    try:
        return ulysses_attention(q, k, v, case.causal, case.scale)
    except ValueError as refusal:
        raise ulysses_kit.Unsupported(str(refusal)) from refusal


def refuse_together(complaint: str | None) -> None:
    """Raises an error on every rank if any has a complaint: who sees it alone would leave the others waiting."""
    is_bad = torch.tensor(float(complaint is not None))
    dist.all_reduce(is_bad, dist.ReduceOp.MAX)
    if is_bad:
        raise ValueError(complaint or "what another rank was given is bad")


class SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors, on every rank.

    Backward hands the cotangent on as it came: the sum is one number that all ranks share, and each takes the
    gradient of that one number for what is its own. Summing the ranks' cotangents would make it P times that.
    """

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad


def loss(states: Tensor, labels: Tensor, case: ulysses_kit.LossCase) -> Tensor:
    """Cross-entropy over the tokens of all ranks: the sum over those with a label, by their number."""
    refuse_together(bad_labels(states, labels, case))
    return loss_over_ranks(states if case.head is None else states @ case.head.T, labels, case)


def loss_over_ranks(logits: Tensor, labels: Tensor, case: ulysses_kit.LossCase | ulysses_kit.ModelCase) -> Tensor:
    logits = logits.flatten(0, 1).to(case.dloss.dtype)
    own = cross_entropy(logits, labels.flatten(), ignore_index=case.ignore_index, reduction="sum")
    count = (labels != case.ignore_index).sum()
    dist.all_reduce(count)
    return SumOverRanks.apply(own) / count.clamp(min=1)  # no label at all: 0, with gradient 0


def bad_labels(
    states: Tensor, labels: Tensor, case: ulysses_kit.LossCase | ulysses_kit.TiledCase
) -> str | None:
    if labels.shape != states.shape[:2]:
        return f"labels are {list(labels.shape)}; there are {list(states.shape[:2])} tokens"
    classes = case.width if isinstance(case, ulysses_kit.TiledCase) else case.vocabulary
    is_class = (labels >= 0) & (labels < classes)
    if wrong := labels[~is_class & (labels != case.ignore_index)].tolist():
        return f"the label {wrong[0]} is none of {classes} classes"
    return None


def tiled(hidden: Tensor, case: ulysses_kit.TiledCase) -> Tensor:
    """A function of the rank's own tokens that keeps the inner tensors of one tile at a time.

    A tile is checkpointed: backward runs it again. Gradients of what all tiles use are summed by autograd.
    """
    if case.tiles < 1:
        raise ValueError(f"{case.tiles} tiles")
    step = max(1, -(-hidden.shape[1] // case.tiles))
    parts = [hidden.split(step, dim=1)]
    if case.labels is not None:
        if complaint := bad_labels(hidden, case.labels, case):
            raise ValueError(complaint)
        parts.append(case.labels.split(step, dim=1))
    outs = [checkpoint(of_tile, case, *tile, use_reentrant=False) for tile in zip(*parts)]
    if case.reduction in (None, "none"):
        return torch.cat(outs, dim=1)
    losses = torch.stack(outs)
    if case.reduction == "mean":
        return losses.sum() / (case.labels != case.ignore_index).sum().clamp(min=1)
    return losses.mean() if case.reduction == "mean-of-tiles" else losses.sum()


def of_tile(case: ulysses_kit.TiledCase, x: Tensor, labels: Tensor | None = None) -> Tensor:
    x, weights = x if case.scale is None else x * case.scale, case.weights
    if case.function == "mlp":
        return (silu(x @ weights["gate"].T) * (x @ weights["up"].T)) @ weights["down"].T
    if case.function == "affine":
        return x @ weights["weight"].T
    logits = (x @ weights["head"].T).to(case.dout.dtype)
    reduction = {"none": "none", "mean-of-tiles": "mean"}.get(case.reduction, "sum")
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=case.ignore_index, reduction=reduction)
    return loss.view_as(labels) if reduction == "none" else loss


def batch(
    batches: list[dict[str, Tensor]], case: ulysses_kit.BatchCase
) -> dict[str, Tensor] | list[list[dict[str, Tensor]]]:
    refuse_together(next((complaint for rows in batches if (complaint := bad_rows(rows, case))), None))
    if case.stream is None:
        return shard(whole_rows(batches[0], case))
    return [list(served(batches, case)) for _ in range(case.stream["epochs"])]


def served(batches: list[dict[str, Tensor]], case: ulysses_kit.BatchCase) -> Iterator[dict[str, Tensor]]:
    """One epoch: in each round this rank's shards of one batch of each rank that still has one, in rank order."""
    own = iter(batches)
    while True:
        of_ranks = [None] * case.world
        rows = next(own, None)
        dist.all_gather_object(of_ranks, rows and whole_rows(rows, case))
        if not any(of_ranks):
            return
        yield from (shard(rows) for rows in of_ranks if rows)


def shard(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's tokens of whole rows: a contiguous run, one longer on the first ranks where they do not divide."""
    return {name: x.tensor_split(dist.get_world_size(), dim=1)[dist.get_rank()] for name, x in rows.items()}


def whole_rows(rows: dict[str, Tensor], case: ulysses_kit.BatchCase) -> dict[str, Tensor]:
    """What has to be done before rows are cut: positions are counted, labels shifted, rows filled up."""
    ids = rows["input_ids"]
    tokens = torch.arange(ids.shape[1], device=ids.device)
    positions = rows.get("position_ids", tokens.expand_as(ids))
    if case.documents == "ends":
        ends = rows["document_ends"]
        document = torch.searchsorted(ends, tokens.expand_as(ids).contiguous(), right=True)
        positions = tokens - pad(ends[:, :-1], (1, 0)).gather(1, document)  # from where its document starts
    targets = pad(rows["labels"][:, 1:], (0, 1), value=case.ignore_index)
    if not case.targets_across_documents:
        begins = pad(positions[:, 1:], (0, 1)) == 0
        targets = targets.masked_fill(begins, case.ignore_index)
    whole = {"input_ids": ids, "position_ids": positions, "shift_labels": targets}
    if case.attention_mask:
        whole["attention_mask"] = rows["attention_mask"]
    if case.padding and (missing := -ids.shape[1] % case.padding["multiple"]):
        fill = {"input_ids": case.padding["pad_id"], "shift_labels": case.ignore_index}
        more = positions[:, -1:] + 1 + torch.arange(missing, device=ids.device)
        whole = {name: pad(x, (0, missing), value=fill.get(name, 0)) for name, x in whole.items()}
        whole["position_ids"] = torch.cat((positions, more), dim=1)
    return whole


def bad_rows(rows: dict[str, Tensor], case: ulysses_kit.BatchCase) -> str | None:
    shape = rows["input_ids"].shape
    for name, x in rows.items():
        if name != "document_ends" and x.shape != shape:
            return f"{name} is {list(x.shape)}, input_ids is {list(shape)}"
    if case.documents == "ends" and (rows["document_ends"][:, -1] != shape[1]).any():
        return f"the last document does not end where a row does, at {shape[1]}"
    if case.padding and case.padding["multiple"] < 1:
        return f"rows cannot be filled up to a multiple of {case.padding['multiple']}"
    return None


@functools.cache  # process groups are made once
def groups_of(dp_replicate: int, dp_shard: int, sp: int) -> tuple[dict[str, dist.ProcessGroup], list[int]]:
    """The process groups of this rank in a mesh of all ranks, and its coordinates. Every rank calls it."""
    # "cpu", since gloo takes tensors of a GPU too, and a mesh of "cuda" wants a GPU for each rank
    mesh = init_device_mesh("cpu", (dp_replicate, dp_shard, sp), mesh_dim_names=("replicate", "shard", "sp"))
    groups = {
        "sequence_parallel": mesh.get_group("sp"),
        "data_parallel_shard": mesh.get_group("shard"),
        "data_parallel_replicate": mesh.get_group("replicate"),
        "data_parallel": init_device_mesh("cpu", (dp_replicate * dp_shard, sp)).get_group(0),
        "sharding": init_device_mesh("cpu", (dp_replicate, dp_shard * sp)).get_group(1),
    }
    return groups, list(mesh.get_coordinate())


def mesh(case: ulysses_kit.MeshCase) -> dict[str, Tensor | list[int]]:
    shape = (case.dp_replicate, case.dp_shard, case.sp)
    shapes = [None] * case.world
    dist.all_gather_object(shapes, shape)
    if case.dp_replicate * case.dp_shard * case.sp != case.world or set(shapes) != {shape}:
        raise ValueError(f"{case.world} ranks are no mesh of {shapes}")
    groups, coordinates = groups_of(*shape)
    answer = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
    answer["coordinates"] = coordinates
    if case.mpu:  # model-parallel ranks are those of a sequence, sequence-data-parallel ones the world
        of_sequence = [coordinates[2], case.sp]
        answer["mpu"] = [*of_sequence, case.rank, case.world, *of_sequence]
    for name, group in groups.items() if case.sums else ():
        total = case.value.clone()
        dist.all_reduce(total, group=group)
        answer[f"sum.{name}"] = total
    return answer


FEATURES = [
    *("dtype-f64", "dtype-f32", "dtype-bf16", "dtype-f16", "mask-full", "mask-causal"),
    *("grouped-kv", "kv-replication", "batch", "value-head-size", "strided-inputs", "recompute", "scale"),
]
OTHERS = ("loss", "tiled", "batch", "mesh")
OF_OTHER_PROFILES = [feature for profile in OTHERS for feature in ulysses_kit.REQUESTS[profile]]

if __name__ == "__main__":
    ulysses_kit.serve(
        implementation="torch-plain",
        version="1",
        features=[*FEATURES, *OF_OTHER_PROFILES],
        setup=setup,
        attention=attention,
        loss=loss,
        tiled=tiled,
        batch=batch,
        mesh=mesh,
    )
