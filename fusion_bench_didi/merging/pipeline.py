"""The whole merge, from task vectors to stored deltas: scan, decompose, allocate, refine.

Two passes over the matrices, one matrix of all T models at a time. The first leaves singular values, couplings and,
while they fit ``factor_memory_gb``, the leading factors; ranks are chosen from these small tables; the second cuts,
refines and packs. Tasks are worked on in sorted order and matrices by sorted name, so that neither order of the pool
changes a bit of the result.
"""

import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..allocation.spectra import MatrixSpectra, total_cost
from ..deltas.precision import Precision
from ..deltas.sink import DeltaSink, InMemory
from ..deltas.storage import account
from ..task_vectors.reader import TaskVectors
from ..task_vectors.scan import Scan
from .basis_store import FactorStore
from .context import Progress, Work
from .encoding import pack_vectors, second_pass
from .forms.tucker import Common, grown
from .inventory import matrix_budget, take_inventory
from .loss_weights import loss_weights
from .metric import metrics_of
from .ranks import allocate, first_pass, refined
from .results import MergeReport, MergeResult, RankAllocation
from .settings import MergeSettings


@dataclass(frozen=True)
class Planned:
    """The first half of a merge: everything is decided, nothing is cut yet.

    Args:
        table, ranks: rows and (T + 1,) ranks per matrix.
        precision: how each of these is stored.
        common: the other matrices.
    """

    work: Work
    scan: Scan
    table: tuple[MatrixSpectra, ...]
    ranks: tuple[Tensor, ...]
    precision: Mapping[str, Precision]
    common: Mapping[str, Common]
    seconds: dict[str, float]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.work.task_vectors.tasks)

    @property
    def allocation(self) -> RankAllocation:
        """Ranks; in common subspaces the rank of a core, shared and for every task."""
        rows = {row.name: k.tolist() for row, k in zip(self.table, self.ranks)}
        for name, common in self.common.items():
            rows[name] = [min(common.sizes)] * (len(self.tasks) + 1)
        rows = {name: rows[name] for name in self.work.inventory.matrices}
        return RankAllocation(
            shared={name: k[0] for name, k in rows.items()},
            experts={
                task: {name: k[t + 1] for name, k in rows.items()}
                for t, task in enumerate(self.tasks)
            },
        )

    def report(self, errors: Mapping[str, Tensor]) -> MergeReport:
        names = self.work.inventory.matrices
        stored_as = {n: c.precision for n, c in self.common.items()} | dict(
            self.precision
        )
        return MergeReport(
            self.tasks,
            {name: self.scan.energy[name] for name in names},
            {name: errors[name] for name in names},
            {name: stored_as[name].name for name in names},
            {name: common.sizes for name, common in self.common.items()},
            self.seconds,
        )


def plan(
    task_vectors: TaskVectors,
    settings: MergeSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> Planned:
    """Scan, decompose and allocate; arguments and errors as of :func:`merge`."""
    seconds: dict[str, float] = {}
    task_vectors = task_vectors.ordered(sorted(task_vectors.tasks))
    with _timed(seconds, "scan"):
        scan = task_vectors.scan(device)
    inventory = take_inventory(task_vectors, settings, scan)
    work = Work(
        task_vectors,
        settings,
        inventory,
        matrix_budget(inventory, settings),
        loss_weights(task_vectors, scan, inventory, settings),
        device,
        progress,
        FactorStore(settings.factor_memory_gb),
        metrics_of(settings.moments),
        scan.energy,
    )
    with _timed(seconds, "decompose"):
        found = first_pass(work)
    table, stored_as = found.table, found.stored_as
    work = replace(work, budget=work.budget - found.common_bits)
    while True:
        with _timed(seconds, "allocate"):
            progress("allocate", 0, 1)
            rows, ranks, precision = table, allocate(work, table), stored_as
            if settings.factor_dtype == "auto":
                rows, ranks, precision = refined(work, table, ranks)
        with _timed(seconds, "decompose"):
            longer = work.extended(table, ranks, stored_as)
        if longer is None:
            break
        table = longer
    common = grown(found.common, work.budget - total_cost(rows, ranks))
    return Planned(work, scan, tuple(rows), tuple(ranks), precision, common, seconds)


def merge(
    task_vectors: TaskVectors,
    settings: MergeSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda stage, done, total: None,
    sink: DeltaSink | None = None,
) -> MergeResult:
    """DiDi-Merging of T task vectors under one budget.

    Args:
        task_vectors: aligned checkpoints.
        settings: all choices.
        device: where the arithmetic happens; results are on the CPU.
        progress: called with (stage, matrices done, matrices in all).
        sink: where stored deltas go; kept in memory if None.

    Raises:
        NonFiniteError, ModelPoolError: from the first read.
        BudgetError: if the vectors alone exceed the budget.
    """
    planned = plan(task_vectors, settings, device=device, progress=progress)
    work = planned.work
    sink = sink or InMemory(planned.tasks)
    errors: dict[str, Tensor] = {}
    with _timed(planned.seconds, "refine"):
        for owned in pack_vectors(
            work.task_vectors, planned.scan, work.inventory, settings
        ):
            sink.put(*owned)
        for name, (first, others), errors[name] in second_pass(
            work, planned.table, planned.ranks, planned.precision, planned.common
        ):
            for task, delta in zip((None, *planned.tasks), (first, *others)):
                if delta is not None:
                    sink.put(task, name, delta)
            del first, others, delta
        shared, experts = sink.close()
    storage = account(shared, experts, unit_bits=work.inventory.unit_bits)
    report = planned.report(errors)
    return MergeResult(shared, experts, planned.allocation, storage, report)


@contextmanager
def _timed(seconds: dict[str, float], stage: str):
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
