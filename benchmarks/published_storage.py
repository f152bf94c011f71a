"""Storage from shapes alone, for published figures.

The deltas of each method are built on the meta device and added up by the one account, so nothing is counted here that is
not counted for a real model in the same way. SMILE and WEMoE are classes of the host that route by input; what they
store is written down as a formula here, and taken from their tensors in :mod:`.host_models`.

Letters: ``m`` out, ``n`` in, ``T`` tasks, ``P`` values of one fine-tuned model, all in float32.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from fusion_bench_didi.deltas.base import Delta
from fusion_bench_didi.deltas.masks import MaskedDelta, SparseDelta, bitmap_is_smaller
from fusion_bench_didi.deltas.plain import DenseDelta, LowRankDelta, SpectralDelta
from fusion_bench_didi.deltas.storage import (
    StorageReport,
    account,
    folded_backbone_bits,
)
from fusion_bench_didi.method.baselines.singular import rank_of, stored_dense
from fusion_bench_didi.task_vectors.reader import matrix_shape

Shapes = Mapping[str, tuple[int, ...]]
Conv = Literal["dense", "matrix"]


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters; the module may be on the meta device."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def masked(shapes: Shapes, tasks: Sequence[str]) -> StorageReport:
    """EMR, TALL masks: one dense vector, one bit per task and entry, one scalar per task and tensor."""
    shared = {name: _dense(shape) for name, shape in shapes.items()}
    expert = {
        name: MaskedDelta(
            shape, _meta(math.ceil(math.prod(shape) / 8), dtype=torch.uint8), _meta()
        )
        for name, shape in shapes.items()
    }
    return _account(shapes, shared, expert, tasks)


def tsv_c(
    shapes: Shapes,
    tasks: Sequence[str],
    *,
    rank_fraction: float | None = None,
    conv: Conv = "dense",
    fold_sigma: bool = True,
) -> StorageReport:
    """TSV-C: truncated matrices, the rest whole, per task; see :class:`~fusion_bench_didi.method.TSVCompression`."""
    fraction = rank_fraction or 1 / len(tasks)
    expert = {
        name: (
            _low_rank(shape, rank_of(shape, fraction), fold_sigma=fold_sigma)
            if _is_matrix(shape, conv)
            else _dense(shape)
        )
        for name, shape in shapes.items()
    }
    return _account(shapes, {}, expert, tasks)


def twin(
    shapes: Shapes,
    tasks: Sequence[str],
    *,
    rank_fraction: float = 0.1,
    conv: Conv = "matrix",
) -> StorageReport:
    """Twin-Merging with oracle routing, folded; see :class:`~fusion_bench_didi.method.TwinMerging`."""
    shared = {n: _dense(s) for n, s in shapes.items() if _is_matrix(s, conv)}
    expert = {
        name: (
            _low_rank(shape, rank_of(shape, rank_fraction))
            if name in shared
            else _dense(shape)
        )
        for name, shape in shapes.items()
    }
    return _account(shapes, shared, expert, tasks, folded=True)


def free(
    shapes: Shapes,
    tasks: Sequence[str],
    *,
    keep: float = 0.01,
    patterns: Sequence[str] = ("*attn*", "*mlp*"),
) -> StorageReport:
    """FREE-Merging with oracle routing, folded; see :class:`~fusion_bench_didi.method.FreeMerging`."""
    shared = {
        name: _dense(shape)
        for name, shape in shapes.items()
        if any(fnmatchcase(name, p) for p in patterns)
    }
    expert = {
        name: _sparse(shapes[name], keep)
        for name in shared
        if _is_matrix(shapes[name], "matrix")
    }
    return _account(shapes, shared, expert, tasks, folded=True)


@dataclass(frozen=True)
class LinearShape:
    """One linear layer, n -> m."""

    m: int
    n: int
    bias: bool = True


def linears_of(module: nn.Module) -> dict[str, LinearShape]:
    """All linear layers by name."""
    return {
        name: LinearShape(layer.out_features, layer.in_features, layer.bias is not None)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def smile(
    values: int,
    linears: Iterable[LinearShape],
    tasks: Sequence[str],
    *,
    rank: int = 128,
    gate_rank: int = 16,
    bits: int = 32,
) -> StorageReport:
    """SMILE (Tang et al., TPAMI 2025) as the host stores it.

    Beside the whole base model, per linear layer and task: U (m, k), S V^T folded (k, n), the change of the bias (m), and
    for the gate the first ``gate_rank`` right singular vectors (n). ``rank`` <= 0 stands for whole experts.

    Args:
        values: P.
        linears: the layers that some task changed.
        bits: per value.
    """
    expert = gate = 0
    for layer in linears:
        full = min(layer.m, layer.n)
        k = min(rank, full)
        weight = k * (layer.m + layer.n) if rank > 0 else layer.m * layer.n
        expert += weight + layer.m * layer.bias
        gate += min(gate_rank, full) * layer.n
    return StorageReport(
        unit_bits=bits * values,
        backbone_bits=bits * values,
        shared_bits=0,
        expert_bits={task: bits * expert for task in tasks},
        routing_bits=bits * gate * len(tasks),
    )


def wemoe(
    values: int,
    blocks: Iterable[tuple[int, int]],
    tasks: Sequence[str],
    *,
    router_layers: int = 2,
    bits: int = 32,
) -> StorageReport:
    """WEMoE (Tang et al., ICML 2024) as the host stores it.

    A backbone whose MLPs are the base model's and whose other tensors are merged by task arithmetic (folded); per block the
    MLP's task vector of every task, and a router d -> d -> T.

    Args:
        values: P.
        blocks: per block, (values of its MLP, width d).
        router_layers: linear layers of a router: 0 (constant weights), 1 or 2.
        bits: per value.
    """
    count, blocks = len(tasks), list(blocks)
    routers = {
        0: lambda d: count,
        1: lambda d: d * count + count,
        2: lambda d: d * d + d + d * count + count,
    }
    return StorageReport(
        unit_bits=bits * values,
        backbone_bits=bits * values,
        shared_bits=0,
        expert_bits={task: bits * sum(mlp for mlp, _ in blocks) for task in tasks},
        routing_bits=bits * sum(routers[router_layers](width) for _, width in blocks),
    )


def _account(
    shapes: Shapes,
    shared: Mapping[str, Delta],
    expert: Mapping[str, Delta | None],
    tasks: Sequence[str],
    *,
    folded: bool = False,
) -> StorageReport:
    """All experts are of the same size."""
    stored = {name: delta for name, delta in expert.items() if delta is not None}
    experts = {task: stored for task in tasks}
    sizes = {name: 32 * math.prod(shape) for name, shape in shapes.items()}
    left = folded_backbone_bits(sizes, shared, experts) if folded else None
    return account(shared, experts, unit_bits=sum(sizes.values()), backbone_bits=left)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dense(shape: tuple[int, ...]) -> DenseDelta:
    return DenseDelta(shape, _meta(*shape))


def _low_rank(
    shape: tuple[int, ...], rank: int, *, fold_sigma: bool = True
) -> Delta | None:
    m, n = matrix_shape(shape)
    if rank <= 0:
        return None
    if stored_dense(shape, rank, fold_sigma=fold_sigma):
        return _dense(shape)
    if fold_sigma:
        return LowRankDelta(shape, _meta(m, rank), _meta(rank, n))
    return SpectralDelta(shape, _meta(m, rank), _meta(rank), _meta(rank, n))


def _sparse(shape: tuple[int, ...], keep: float) -> SparseDelta:
    m, n = matrix_shape(shape)
    count = m * max(1, int(keep * n + 1e-9))
    where = _meta(count, dtype=torch.int32)
    if bitmap_is_smaller(count, m * n):
        where = _meta(math.ceil(m * n / 8), dtype=torch.uint8)
    return SparseDelta(shape, where, _meta(count))


def _is_matrix(shape: tuple[int, ...], conv: Conv) -> bool:
    return min(matrix_shape(shape)) >= 2 and (len(shape) == 2 or conv == "matrix")
