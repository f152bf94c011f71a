"""The whole merge, from task vectors to stored deltas: scan, decompose, allocate, refine.

Two passes over the matrices, one matrix of all T models at a time. The first leaves singular values, couplings and,
while they fit ``factor_memory_gb``, the leading factors; ranks are chosen from these small tables; the second cuts,
refines and packs. Tasks are worked on in sorted order and matrices by sorted name, so that neither order of the pool
changes a bit of the result.
"""

import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .deltas import Delta
from .first_pass import Progress, Work, loss_weights
from .layout import MergeSettings, lay_out, matrix_budget
from .lowrank import refine
from .packing import cut, kept_out, pack, pack_vectors
from .storage import StorageReport, account
from .task_vectors import TaskVectors


@dataclass(frozen=True)
class RankAllocation:
    """Rank per matrix of the shared module, and per task of the experts."""

    shared: Mapping[str, int]
    experts: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class MergeReport:
    """What the merge did.

    Args:
        tasks: sorted; the order of all (T,) tensors.
        energy: per matrix, (T,) squared norms of the task vectors.
        errors: per matrix, (T,) squared norms of what was kept out.
        precision: per matrix, how its modules are stored.
        seconds: per stage.
    """

    tasks: tuple[str, ...]
    energy: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    precision: Mapping[str, str]
    seconds: Mapping[str, float]

    @property
    def relative_error(self) -> float:
        """Energy kept out over energy, all matrices and tasks."""
        lost = sum(float(e.sum()) for e in self.errors.values())
        return lost / max(sum(float(e.sum()) for e in self.energy.values()), 1e-300)

    @property
    def energy_kept(self) -> dict[str, list[float]]:
        """Per matrix, the fraction of each task's energy that is reproduced."""
        return {
            name: (1 - self.errors[name] / energy.clamp(min=1e-300)).tolist()
            for name, energy in self.energy.items()
        }


@dataclass(frozen=True)
class MergeResult:
    """Stored deltas by tensor name, and how they came about."""

    shared: Mapping[str, Delta]
    experts: Mapping[str, Mapping[str, Delta]]
    ranks: RankAllocation
    storage: StorageReport
    report: MergeReport


def merge(
    task_vectors: TaskVectors,
    settings: MergeSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> MergeResult:
    """DiDi-Merging of T task vectors under one budget.

    Args:
        task_vectors: aligned checkpoints.
        settings: all choices.
        device: where the arithmetic happens; results are on the CPU.
        progress: called with (stage, matrices done, matrices in all).

    Raises:
        NonFiniteError, ModelPoolError: from the first read.
        BudgetError: if the vectors alone exceed the budget.
    """
    seconds: dict[str, float] = {}
    task_vectors = task_vectors.ordered(sorted(task_vectors.tasks))
    tasks = tuple(task_vectors.tasks)
    with _timed(seconds, "scan"):
        scan = task_vectors.scan(device)
    layout = lay_out(task_vectors, settings, scan)
    work = Work(
        task_vectors,
        settings,
        layout,
        matrix_budget(layout, settings),
        loss_weights(scan, layout, settings),
        device,
        progress,
    )
    with _timed(seconds, "decompose"):
        table, kept, stored_as = work.first_pass()
    with _timed(seconds, "allocate"):
        progress("allocate", 0, 1)
        ranks = work.allocate(table)
        if settings.factor_dtype == "auto":
            table, ranks, stored_as = work.upgrade(table, ranks)
    shared, experts = pack_vectors(task_vectors, scan, layout, settings)
    errors: dict[str, Tensor] = {}
    with _timed(seconds, "refine"):
        for i, (row, k) in enumerate(zip(table, ranks)):
            progress("refine", i, len(table))
            vectors = work.read(row.name)  # (T, m, n)
            parts = kept.pop(row.name, None) or work.decompose(row.name, vectors, row)
            modules = refine(
                cut(parts, k.tolist(), row.full, work.shared(row.name, vectors)),
                vectors,
                weights=work.weights[row.name],
                how=settings.refinement,
                settings=settings.refining,
                settled=row.fixed_shared is not None,
            )
            first, others = pack(
                modules,
                k.tolist(),
                vectors,
                shape=task_vectors.infos[row.name].shape,
                precision=stored_as[row.name],
            )
            if first is not None:
                shared[row.name] = first
            for task, delta in zip(tasks, others):
                if delta is not None:
                    experts[task][row.name] = delta
            errors[row.name] = kept_out(first, others, vectors)
    allocation = RankAllocation(
        shared={row.name: int(k[0]) for row, k in zip(table, ranks)},
        experts={
            task: {row.name: int(k[t + 1]) for row, k in zip(table, ranks)}
            for t, task in enumerate(tasks)
        },
    )
    report = MergeReport(
        tasks,
        {name: scan.energy[name] for name in layout.matrices},
        errors,
        {name: precision.name for name, precision in stored_as.items()},
        seconds,
    )
    storage = account(shared, experts, unit_bits=layout.unit_bits)
    return MergeResult(shared, experts, allocation, storage, report)


@contextmanager
def _timed(seconds: dict[str, float], stage: str):
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
