"""From low-rank modules to stored deltas."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .deltas import Delta, DenseDelta
from .layout import Layout, MergeSettings
from .lowrank import Decomposition, LowRankFactors, Modules, subspace_step
from .precision import Precision
from .task_vectors import Scan, TaskVectors


def cut(
    decomposition: Decomposition, ranks: list[int], full: int, shared: Tensor
) -> Modules:
    """Truncated SVDs, Eq. 5; a full-rank expert is None (dense), a full-rank shared module is S itself.

    Args:
        ranks: of the shared module and of each expert.
        shared: (m, n) the whole shared matrix.
    """
    experts = tuple(
        None if k >= full else spectrum.cut(k)
        for spectrum, k in zip(decomposition.experts, ranks[1:])
    )
    if ranks[0] < full:
        return Modules(decomposition.shared.cut(ranks[0]), experts)
    m, n = shared.shape
    eye = torch.eye(min(m, n), dtype=shared.dtype, device=shared.device)
    whole = LowRankFactors(shared, eye) if m >= n else LowRankFactors(eye, shared)
    return Modules(whole, experts)


def pack(
    modules: Modules,
    ranks: list[int],
    task_vectors: Tensor,
    *,
    shape: tuple[int, ...],
    precision: Precision,
) -> tuple[Delta | None, list[Delta | None]]:
    """Stored forms of one matrix: the shared one and one per task, None where the rank is zero.

    Where numbers are rounded to few bits, the experts are fitted to what the *stored* shared part leaves.

    Args:
        task_vectors: (T, m, n).
        shape: of the tensor.
    """
    full = min(task_vectors.shape[1:])
    first: Delta | None = None
    if ranks[0] >= full:
        first = precision.dense(shape, modules.shared.dense().cpu())
    elif ranks[0] > 0:
        first = precision.low_rank(shape, modules.shared.to("cpu"), None)
    base = None if first is None else first.change().flatten(1)
    others: list[Delta | None] = []
    for factors, tau in zip(modules.experts, task_vectors.cpu()):
        rest = tau if base is None else tau - base
        if factors is None:
            others.append(precision.dense(shape, rest))
        elif factors.rank == 0:
            others.append(None)
        else:
            factors = factors.to("cpu")
            if precision.rounding and base is not None:
                factors = subspace_step(rest, factors)
            others.append(precision.low_rank(shape, factors, rest))
    return first, others


def kept_out(
    first: Delta | None, others: list[Delta | None], task_vectors: Tensor
) -> Tensor:
    """(T,) squared errors of what was really stored."""
    shared = None if first is None else first.change()
    errors = []
    for delta, tau in zip(others, task_vectors.cpu()):
        change = delta.change(shared) if delta is not None else shared
        rest = tau if change is None else tau - change.view_as(tau)
        errors.append(rest.double().square().sum())
    return torch.stack(errors)


def pack_vectors(
    task_vectors: TaskVectors,
    scan: Scan,
    layout: Layout,
    settings: MergeSettings,
) -> tuple[dict[str, Delta], Mapping[str, dict[str, Delta]]]:
    """Biases, norms and the like under the vector policy: shared deltas, and deltas per task."""
    shared: dict[str, Delta] = {}
    experts: dict[str, dict[str, Delta]] = {task: {} for task in task_vectors.tasks}
    if settings.vectors == "pretrained":
        return shared, experts
    for name in layout.vectors:
        vectors, dtype = task_vectors.read(name), layout.vector_dtypes[name]
        shape = task_vectors.infos[name].shape
        if settings.vectors == "shared":
            shared[name] = DenseDelta(shape, vectors.mean(0).to(dtype))
            continue
        for task, tau, energy in zip(task_vectors.tasks, vectors, scan.energy[name]):
            if energy > 0:
                experts[task][name] = DenseDelta(shape, tau.to(dtype))
    return shared, experts
