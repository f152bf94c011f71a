"""From low-rank modules to stored deltas."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .deltas import Delta, DenseDelta
from .layout import Layout, MergeSettings
from .lowrank import (
    Decomposition,
    Matrix,
    Modules,
    as_dense,
    as_product,
    cores,
    energy_of,
    subspace_step,
    subtracting,
)
from .metric import Metric
from .precision import Precision
from .task_vectors import Scan, TaskVectors, matrix_shape


def cut(
    decomposition: Decomposition,
    ranks: Sequence[int],
    full: int,
    shared: Matrix,
    task_vectors: Sequence[Matrix],
    *,
    settled: bool = False,
) -> Modules:
    """Truncated SVDs, Eq. 5; a full-rank expert is None (dense), a full-rank shared module is S itself.

    Args:
        ranks: of the shared module and of each expert.
        shared: (m, n) the whole shared matrix.
        task_vectors: T of (m, n).
        settled: the experts were decomposed against the shared module of its rank, not against the whole of S.
    """
    if ranks[0] < full:
        first = decomposition.shared.factors(shared, ranks[0])
    else:
        first = as_product(shared)
    left = subtracting(first if settled else shared)
    experts = tuple(
        None if k >= full else spectrum.factors(left(tau), k)
        for tau, spectrum, k in zip(task_vectors, decomposition.experts, ranks[1:])
    )
    return Modules(first, experts)


def pack(
    modules: Modules,
    ranks: Sequence[int],
    task_vectors: Sequence[Matrix],
    *,
    shape: tuple[int, ...],
    precision: Precision,
) -> tuple[tuple[Delta | None, list[Delta | None]], Tensor]:
    """Stored forms of one matrix: the shared one and one per task, None where the rank is zero; (T,) squared errors.

    Where numbers are rounded to few bits, the experts are fitted to what the *stored* shared part leaves.

    Args:
        task_vectors: T of (m, n); multiplied out only for an expert that is stored dense.
        shape: of the tensor.
    """
    first = pack_shared(modules.shared, ranks[0], shape=shape, precision=precision)
    base = change_of(first)
    left = subtracting(base)
    others: list[Delta | None] = []
    errors = []
    for factors, tau in zip(modules.experts, task_vectors):
        tau = tau.cpu()
        if factors is None:
            less = None if base is None else as_dense(base)
            (delta,), (error,) = precision.dense(shape, [(as_dense(tau), less)])
        elif factors.rank == 0:
            delta, error = None, energy_of(left(tau))
        else:
            rest, factors = left(tau), factors.to("cpu")
            if precision.rounding and first is not None:
                factors = subspace_step(rest, factors)
            delta, error = precision.low_rank(shape, factors, rest)
            if error is None:
                error = _kept_out(first, delta, tau)
        others.append(delta)
        errors.append(torch.as_tensor(error, dtype=torch.float64))
    return (first, others), torch.stack(errors)


def pack_shared(
    shared: Matrix, rank: int, *, shape: tuple[int, ...], precision: Precision
) -> Delta | None:
    """Stored form of a shared module: whole at full rank, None at rank zero.

    Args:
        shared: (m, n), factored below full rank.
    """
    if rank >= min(matrix_shape(shape)):
        return precision.dense(shape, [(as_dense(shared).cpu(), None)])[0][0]
    return precision.low_rank(shape, shared.to("cpu"), None)[0] if rank else None


def pack_common(
    up: Tensor,
    down: Tensor,
    task_vectors: Sequence[Matrix],
    *,
    shape: tuple[int, ...],
    precision: Precision,
    metric: Metric | None = None,
) -> tuple[tuple[Delta, list[Delta | None]], Tensor]:
    """Stored forms of one matrix in common subspaces, and (T,) squared errors; cores are fitted to the bases *as stored*.

    Args:
        up, down: (m, p) and (q, n), square for whole sides.
        task_vectors: T of (m, n).
        shape: of the tensor.
        metric: how errors are weighed by direction; alike if None.
    """
    first = precision.bases(shape, up.cpu(), down.cpu())
    stored = zip(first.bases(), (up, down))
    up, down = (whole.cpu() if kept is None else kept for kept, whole in stored)
    vectors = [tau.cpu() for tau in task_vectors]
    if metric is None:
        fitted = cores(vectors, up, down)
    else:
        fitted = cores(metric.weighed(vectors), up, metric.weighed(down))
    others = [
        precision.core(shape, core) if bool(energy_of(tau) > 0) else None
        for tau, core in zip(vectors, fitted)
    ]
    errors = [_kept_out(first, delta, tau) for delta, tau in zip(others, vectors)]
    return (first, others), torch.stack(errors)


def _kept_out(first: Delta | None, delta: Delta | None, tau: Matrix) -> Tensor:
    """Squared error of what was really stored."""
    change = change_of(first, delta)
    return energy_of(tau if change is None else tau - change)


def change_of(first: Delta | None, delta: Delta | None = None) -> Matrix | None:
    """What is stored for one task, (m, n): factored where all of it is, None where nothing is.

    Args:
        first: the shared part.
        delta: the task's own.
    """
    last, below = (first, None) if delta is None else (delta, first)
    if last is None:
        return None
    product = last.product(below)
    return last.change(below).flatten(1) if product is None else product


def pack_vectors(
    task_vectors: TaskVectors,
    scan: Scan,
    layout: Layout,
    settings: MergeSettings,
) -> Iterator[tuple[str | None, str, Delta]]:
    """Biases, norms and the like under the vector policy: task (None for all), name, delta."""
    if settings.vectors == "pretrained":
        return
    for name in layout.vectors:
        vectors, dtype = task_vectors.read(name), layout.vector_dtypes[name]
        shape = task_vectors.infos[name].shape
        if settings.vectors == "shared":
            yield None, name, DenseDelta(shape, vectors.mean(0).to(dtype))
            continue
        for task, tau, energy in zip(task_vectors.tasks, vectors, scan.energy[name]):
            if energy > 0:
                yield task, name, DenseDelta(shape, tau.to(dtype))
