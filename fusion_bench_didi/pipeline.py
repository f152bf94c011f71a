"""The whole merge, from task vectors to stored deltas: scan, decompose, allocate, refine.

Two passes over the matrices, one matrix of all T models at a time. The first leaves singular values, couplings and,
while they fit ``factor_memory_gb``, the leading factors; ranks are chosen from these small tables; the second cuts,
refines and packs. Tasks are worked on in sorted order and matrices by sorted name, so that neither order of the pool
changes a bit of the result.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .budget import Budget, dtype_bits
from .deltas import Delta, DenseDelta, LowRankDelta
from .errors import BudgetError
from .lowrank import (
    Allocation,
    Decomposition,
    LearningSettings,
    LowRankFactors,
    MatrixSpectra,
    Modules,
    Price,
    Refinement,
    RefinementSettings,
    SharedMerge,
    decompose,
    greedy,
    learn_ranks,
    rank_cap,
    refine,
    shared_matrix,
    spectra_of,
    uniform,
)
from .storage import StorageReport, account
from .task_vectors import Scan, TaskVectors, matrix_shape

Normalisation = Literal["none", "task", "matrix"]
VectorPolicy = Literal["expert", "shared", "pretrained"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergeSettings:
    """Every choice of the merge; see ``config/method/didi.yaml`` for what each does.

    Args:
        normalisation: weight of a squared error: ``none`` 1 (plain MSE); ``task`` 1 / (energy of the task);
            ``matrix`` 1 / (energy of this matrix of the task), the relative error.
        factor_dtype: type of everything that is stored; the checkpoints' own if None.
    """

    budget: Budget
    shared: SharedMerge = "mean"
    shared_scale: float = 0.3
    ties_keep: float = 0.2
    allocation: Allocation = "learned"
    refinement: Refinement = "alternating"
    normalisation: Normalisation = "matrix"
    vectors: VectorPolicy = "expert"
    factor_dtype: torch.dtype | None = None
    learning: LearningSettings = LearningSettings()
    warm_start: bool = True
    refining: RefinementSettings = RefinementSettings()
    factor_memory_gb: float = 4.0


@dataclass(frozen=True)
class RankAllocation:
    """Rank per matrix of the shared module, and per task of the experts."""

    shared: Mapping[str, int]
    experts: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class MergeReport:
    """What the merge did.

    Args:
        energy: per matrix, (T,) squared norms of the task vectors, tasks sorted.
        errors: per matrix, (T,) squared norms of what was kept out.
        seconds: per stage.
    """

    tasks: tuple[str, ...]
    energy: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    seconds: Mapping[str, float]

    @property
    def relative_error(self) -> float:
        """Energy kept out over energy, all matrices and tasks."""
        lost = sum(float(e.sum()) for e in self.errors.values())
        return lost / sum(float(e.sum()) for e in self.energy.values())


@dataclass(frozen=True)
class MergeResult:
    """Stored deltas by tensor name, and how they came about."""

    shared: Mapping[str, Delta]
    experts: Mapping[str, Mapping[str, Delta]]
    ranks: RankAllocation
    storage: StorageReport
    report: MergeReport


@dataclass(frozen=True)
class Layout:
    """What is to be merged, known after one read of the files.

    Args:
        matrices, vectors: changed tensors by class, sorted.
        unit_bits: one fine-tuned model.
        vector_bits: what the vectors will cost.
    """

    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    unit_bits: int
    vector_bits: int
    prices: Mapping[str, Price]
    dtypes: Mapping[str, torch.dtype]


def lay_out(
    task_vectors: TaskVectors, settings: MergeSettings, scan: Scan | None
) -> Layout:
    """Sort the tensors into classes and price them; without a scan every tensor counts as changed."""
    names = scan.changed if scan else list(task_vectors.infos)
    matrices = [n for n in names if task_vectors.is_matrix(n)]
    vectors = [n for n in names if not task_vectors.is_matrix(n)]
    own = {n: task_vectors.tuned_dtype(n) for n in names}
    stored = {n: settings.factor_dtype or own[n] for n in names}
    copies = {"expert": len(task_vectors.tasks), "shared": 1, "pretrained": 0}

    def vector_copies(name: str) -> int:
        if settings.vectors == "expert" and scan:
            return int((scan.energy[name] > 0).sum())
        return copies[settings.vectors]

    prices = {}
    for name in matrices:
        m, n = matrix_shape(task_vectors.infos[name].shape)
        bits = dtype_bits(stored[name])
        prices[name] = Price(per_rank=bits * (m + n), dense=bits * m * n)
    return Layout(
        matrices=tuple(matrices),
        vectors=tuple(vectors),
        unit_bits=sum(task_vectors.infos[n].numel * dtype_bits(own[n]) for n in names),
        vector_bits=sum(
            task_vectors.infos[n].numel * dtype_bits(stored[n]) * vector_copies(n)
            for n in vectors
        ),
        prices=prices,
        dtypes=stored,
    )


def matrix_budget(layout: Layout, settings: MergeSettings) -> int:
    """Bits left for low-rank modules.

    Raises:
        BudgetError: with the smallest budget that holds the vectors.
    """
    left = settings.budget.bits(layout.unit_bits) - layout.vector_bits
    if left < 0:
        smallest = settings.budget.named(layout.vector_bits / layout.unit_bits)
        raise BudgetError(
            f"budget={settings.budget.ratio} is too small: the vectors (biases, norms, ...) alone take "
            f"{smallest:.6f}. Give at least that, or store fewer with method.vectors=shared or pretrained."
        )
    return left


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
    clock = _Clock()
    tasks = tuple(sorted(task_vectors.tasks))
    ordered = task_vectors.ordered(tasks)
    with clock("scan"):
        scan = ordered.scan(device)
    layout = lay_out(ordered, settings, scan)
    budget = matrix_budget(layout, settings)
    weights = _weights(scan, layout, settings.normalisation)

    table: list[MatrixSpectra] = []
    kept: dict[str, Decomposition] = {}
    room = settings.factor_memory_gb * 2**30
    with clock("decompose"):
        for i, name in enumerate(layout.matrices):
            progress("decompose", i, len(layout.matrices))
            row, decomposition = _first_pass(
                ordered, name, weights[name], layout, budget, settings, device
            )
            table.append(row)
            room -= _bytes(decomposition)
            if room > 0:
                kept[name] = decomposition
    with clock("allocate"):
        progress("allocate", 0, 1)
        ranks = _allocate(table, budget, layout.unit_bits, settings)

    shared: dict[str, Delta] = {}
    experts: dict[str, dict[str, Delta]] = {task: {} for task in tasks}
    errors: dict[str, Tensor] = {}
    with clock("refine"):
        for i, (row, k) in enumerate(zip(table, ranks)):
            progress("refine", i, len(table))
            vectors = _stacked(ordered, row.name, device)  # (T, m, n)
            decomposition = kept.pop(row.name, None)
            if decomposition is None:
                decomposition = _decompose(vectors, row, weights[row.name], settings)
            modules = refine(
                _cut(decomposition, k.tolist(), row.full, _shared(vectors, settings)),
                vectors,
                weights=weights[row.name],
                how=settings.refinement,
                settings=settings.refining,
            )
            first, others = _pack(
                modules, k.tolist(), vectors, row, ordered, layout.dtypes[row.name]
            )
            if first is not None:
                shared[row.name] = first
            for task, delta in zip(tasks, others):
                if delta is not None:
                    experts[task][row.name] = delta
            errors[row.name] = _errors(first, others, vectors)
    _pack_vectors(ordered, tasks, scan, layout, settings, shared, experts)
    allocation = RankAllocation(
        shared={row.name: int(k[0]) for row, k in zip(table, ranks)},
        experts={
            task: {row.name: int(k[t + 1]) for row, k in zip(table, ranks)}
            for t, task in enumerate(tasks)
        },
    )
    storage = account(shared, experts, unit_bits=layout.unit_bits)
    energy = {name: scan.energy[name] for name in layout.matrices}
    report = MergeReport(tasks, energy, errors, clock.seconds)
    return MergeResult(shared, experts, allocation, storage, report)


def _weights(scan: Scan, layout: Layout, how: Normalisation) -> dict[str, Tensor]:
    """(T,) weight of each task's squared error, per matrix."""
    energies = {name: scan.energy[name] for name in layout.matrices}
    if how == "none":
        return {name: torch.ones_like(e).float() for name, e in energies.items()}
    if how == "task":
        total = torch.stack(list(energies.values())).sum(0)
        energies = {name: total for name in energies}
    elif how != "matrix":
        raise ValueError(f"normalisation={how!r}; choose none, task or matrix.")
    weights = {}
    for name, e in energies.items():
        # a task that leaves the matrix alone is disturbed by a shared change as much as the average task
        e = torch.where(e > 0, e, e[e > 0].mean())
        weights[name] = (1.0 / e).float()
    return weights


def _stacked(task_vectors: TaskVectors, name: str, device) -> Tensor:
    vectors = task_vectors.read(name, device)
    return vectors.view(
        len(vectors), *matrix_shape(vectors.shape[1:])
    )  # (T, m, n)


def _first_pass(task_vectors, name, weights, layout, budget, settings, device):
    vectors = _stacked(task_vectors, name, device)
    shape = tuple(vectors.shape[1:])
    price = layout.prices[name]
    in_reach = min(rank_cap(*shape), budget // price.per_rank)
    coupled = settings.allocation == "learned" and settings.learning.coupled
    decomposition = decompose(
        vectors,
        _shared(vectors, settings),
        max_rank=max(in_reach, 1),
        coupled=coupled and settings.shared != "none",
        name=name,
    )
    row = spectra_of(
        name,
        decomposition,
        weights=weights,
        price=price,
        shape=shape,
        expert_only=settings.shared == "none",
    )
    return row, decomposition


def _shared(vectors: Tensor, settings: MergeSettings) -> Tensor:
    return shared_matrix(
        vectors,
        how=settings.shared,
        scale=settings.shared_scale,
        keep=settings.ties_keep,
    )


def _decompose(vectors, row: MatrixSpectra, weights, settings) -> Decomposition:
    return decompose(
        vectors,
        _shared(vectors, settings),
        max_rank=row.sigma.shape[1],
        coupled=False,
        name=row.name,
    )


def _allocate(table, budget: int, unit: int, settings: MergeSettings) -> list[Tensor]:
    if settings.allocation == "uniform":
        return uniform(table, budget)
    if settings.allocation == "greedy":
        return greedy(table, budget)
    if settings.allocation == "learned":
        start = greedy(table, budget) if settings.warm_start else uniform(table, budget)
        return learn_ranks(
            table, budget, start=start, settings=settings.learning, unit=unit
        )
    raise BudgetError(
        f"allocation={settings.allocation!r}; choose learned, greedy or uniform."
    )


def _cut(
    decomposition: Decomposition, ranks: list[int], full: int, shared: Tensor
) -> Modules:
    """Truncated SVDs, Eq. 5; a full-rank expert is None (dense), a full-rank shared module is S itself."""
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


def _pack(modules: Modules, ranks, vectors, row, task_vectors, dtype):
    """Stored forms of one matrix: shared (or None) and per task (or None)."""
    shape = task_vectors.infos[row.name].shape
    first: Delta | None = None
    if ranks[0] >= row.full:
        first = DenseDelta(shape, modules.shared.dense().to(dtype).cpu())
    elif ranks[0] > 0:
        first = LowRankDelta.of(shape, modules.shared.to("cpu"), dtype)
    base = 0.0 if first is None else first.change().view_as(vectors[0].cpu())
    others: list[Delta | None] = []
    for factors, tau in zip(modules.experts, vectors):
        if factors is None:
            others.append(DenseDelta(shape, (tau.cpu() - base).to(dtype)))
        elif factors.rank:
            others.append(LowRankDelta.of(shape, factors.to("cpu"), dtype))
        else:
            others.append(None)
    return first, others


def _errors(first: Delta | None, others, vectors: Tensor) -> Tensor:
    """(T,) squared errors of what was really stored, in float32."""
    shared = None if first is None else first.change()
    errors = []
    for delta, tau in zip(others, vectors.cpu()):
        change = delta.change(shared) if delta is not None else shared
        kept = 0.0 if change is None else change.view_as(tau)
        errors.append((tau - kept).double().square().sum())
    return torch.stack(errors)


def _pack_vectors(task_vectors, tasks, scan, layout, settings, shared, experts) -> None:
    for name in layout.vectors:
        if settings.vectors == "pretrained":
            return
        vectors, dtype = task_vectors.read(name), layout.dtypes[name]
        shape = task_vectors.infos[name].shape
        if settings.vectors == "shared":
            shared[name] = DenseDelta(shape, vectors.mean(0).to(dtype))
            continue
        for task, tau, energy in zip(tasks, vectors, scan.energy[name]):
            if energy > 0:
                experts[task][name] = DenseDelta(shape, tau.to(dtype))


def _bytes(decomposition: Decomposition) -> int:
    parts = (decomposition.shared, *decomposition.experts)
    return sum(4 * (p.U.numel() + p.Vh.numel()) for p in parts)


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, stage: str):
        self._stage = stage
        return self

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds[self._stage] = time.perf_counter() - self._start
