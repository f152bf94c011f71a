"""The first pass over the matrices: decompose, decide what to share and in how many bits, allocate ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import Layout, MergeSettings, matrix_price
from .lowrank import (
    Candidate,
    Decomposition,
    MatrixSpectra,
    Spectrum,
    choose,
    decompose,
    greedy,
    learn_ranks,
    shared_matrix,
    singular_values,
    spectra_of,
    spectrum,
    uniform,
    upgrade,
    water_level,
)
from .precision import Precision
from .task_vectors import Scan, TaskVectors, matrix_shape

Progress = Callable[[str, int, int], None]


def loss_weights(
    scan: Scan, layout: Layout, settings: MergeSettings
) -> dict[str, Tensor]:
    """(T,) weight of each task's squared error, per matrix.

    ``root`` weighs by 1 / ||tau||: plain MSE spends everything on the matrices of most energy, the relative error as
    much on those that hardly moved; the mean of the two (in the exponent) kept most accuracy where it was measured.
    """
    energies = {name: scan.energy[name] for name in layout.matrices}
    how = settings.normalisation
    if how == "none":
        return {name: torch.ones_like(e).float() for name, e in energies.items()}
    if how == "sensitivity":
        known = settings.sensitivity or {}
        if not known:
            raise ValueError("normalisation=sensitivity needs settings.sensitivity.")
        average = sum(known.values()) / len(known)
        return {
            name: torch.full_like(e, known.get(name, average) / average).float()
            for name, e in energies.items()
        }
    if how == "task":
        total = torch.stack(list(energies.values())).sum(0)
        energies = {name: total for name in energies}
    power = 0.5 if how == "root" else 1.0
    weights = {}
    for name, e in energies.items():
        # a task that leaves the matrix alone is disturbed by a shared change as much as the average task
        e = torch.where(e > 0, e, e[e > 0].mean())
        weights[name] = e.pow(-power).float()
    return weights


@dataclass(frozen=True)
class Work:
    """The matrices of one merge and everything that is fixed while they are worked on."""

    task_vectors: TaskVectors
    settings: MergeSettings
    layout: Layout
    budget: int
    weights: Mapping[str, Tensor]
    device: torch.device | str
    progress: Progress

    def read(self, name: str) -> Tensor:
        """Task vectors of one matrix, (T, m, n)."""
        vectors = self.task_vectors.read(name, self.device)
        return vectors.view(len(vectors), *matrix_shape(vectors.shape[1:]))

    def shared(self, name: str, vectors: Tensor) -> Tensor:
        return shared_matrix(
            vectors,
            how=self.settings.shared,
            weights=self.weights[name].to(vectors),
            scale=self.settings.shared_scale,
            keep=self.settings.ties_keep,
        )

    def in_reach(self, name: str) -> int:
        """The largest rank that the price and the budget allow for a matrix."""
        price = matrix_price(self.layout, self.task_vectors, name)
        return max(min(price.cap, self.budget // price.per_rank), 1)

    def first_pass(self):
        """Table rows, first-pass factors while they fit in memory, and the precision per matrix."""
        if self.settings.joint:
            return self._joint_pass()
        room, table, kept, stored_as = _Room(self.settings), [], {}, {}
        names = self.layout.matrices
        fixed = 0 if self.settings.shared == "none" else None
        for i, name in enumerate(names):
            self.progress("decompose", i, len(names))
            vectors = self.read(name)
            parts = decompose(
                vectors,
                self.shared(name, vectors),
                max_rank=self.in_reach(name),
                coupled=self.settings.allocation == "learned"
                and self.settings.learning.coupled
                and fixed is None,
                name=name,
            )
            stored_as[name] = self.layout.precisions[name][0]
            table.append(self._row(name, parts, stored_as[name], fixed))
            room.keep(kept, name, parts)
        return table, kept, stored_as

    def _joint_pass(self):
        """Choose shared rank and precision per matrix first (``lowrank.candidates``), then decompose against them."""
        room, kept, means = _Room(self.settings), {}, {}
        own: dict[str, Candidate] = {}
        names = self.layout.matrices
        for i, name in enumerate(names):
            self.progress("decompose", i, len(names))
            vectors = self.read(name)
            parts = decompose(
                vectors,
                torch.zeros_like(vectors[0]),
                max_rank=self.in_reach(name),
                coupled=False,
                name=name,
            )
            own[name] = self._candidate(name, parts.experts)
            if self.settings.residual == "truncated" and self.settings.shared != "none":
                means[name] = spectrum(
                    self.shared(name, vectors), max_rank=self.in_reach(name)
                ).S.cpu()
            room.keep(kept, name, parts)
        level = water_level(
            [own[n].sigma for n in names],
            [self.weights[n] for n in names],
            [own[n].price for n in names],
            self.budget,
        )
        options = []
        for i, name in enumerate(names):
            self.progress("share", i, len(names))
            options.append(self._options(name, own[name], means.get(name), level))
        picks = choose(options, [self.weights[n] for n in names], self.budget)
        table, stored_as = [], {}
        for name, row, pick in zip(names, options, picks):
            chosen = row[pick]
            stored_as[name] = next(
                p for p in self.layout.precisions[name] if p.name == chosen.precision
            )
            if chosen.shared_rank:
                kept.pop(name, None)
                parts = self.decompose(name, self.read(name), chosen.shared_rank)
                room.keep(kept, name, parts)
            else:
                parts = kept.get(name) or self.decompose(name, self.read(name), 0)
            table.append(self._row(name, parts, stored_as[name], chosen.shared_rank))
        return table, kept, stored_as

    def _options(
        self, name: str, own: Candidate, mean: Tensor | None, level: float
    ) -> list[Candidate]:
        """Experts only, and what might pay beside it; each in every allowed precision."""
        candidates = [own]
        shape = matrix_shape(self.task_vectors.infos[name].shape)
        if mean is not None and level > 0:
            weights = self.weights[name]
            gain = weights.sum() * mean.square() / own.price.per_rank
            # a shared component gains at most this much per bit; where it gains T levels, every expert would hold it too
            ranks = {int((gain >= level * times).sum()) for times in (1, len(weights))}
            vectors = self.read(name) if max(ranks) else None
            for k in sorted(ranks - {0}):
                whole = spectrum(self.shared(name, vectors), max_rank=k)
                rest = singular_values(vectors - whole.cut(k).dense()).cpu()
                candidates.append(
                    replace(
                        own,
                        shared_rank=k,
                        sigma=rest,
                        tail_energy=torch.zeros(len(rest)),
                    )
                )
        return [
            replace(c, price=p.price(*shape), precision=p.name, rounding=p.rounding)
            for c in candidates
            for p in self.layout.precisions[name]
        ]

    def _candidate(self, name: str, parts: tuple[Spectrum, ...]) -> Candidate:
        """Experts only, in the cheapest precision."""
        precision = self.layout.precisions[name][0]
        shape = matrix_shape(self.task_vectors.infos[name].shape)
        return Candidate(
            0,
            precision.price(*shape),
            precision.name,
            torch.stack([p.S for p in parts]).cpu(),
            torch.tensor([p.tail_energy for p in parts]),
            precision.rounding,
        )

    def decompose(
        self, name: str, vectors: Tensor, row: "MatrixSpectra | int"
    ) -> Decomposition:
        """Spectra against the shared part cut to a fixed rank, or against the whole of it where that is not fixed."""
        fixed = row if isinstance(row, int) else row.fixed_shared
        shared = self.shared(name, vectors)
        if fixed is not None:
            shared = spectrum(shared, max_rank=max(fixed, 1)).cut(fixed).dense()
        return decompose(
            vectors, shared, max_rank=self.in_reach(name), coupled=False, name=name
        )

    def _row(
        self, name: str, parts: Decomposition, precision: Precision, fixed: int | None
    ) -> MatrixSpectra:
        shape = matrix_shape(self.task_vectors.infos[name].shape)
        return spectra_of(
            name,
            parts,
            weights=self.weights[name],
            price=precision.price(*shape),
            shape=shape,
            fixed_shared=fixed,
        )

    def allocate(self, table: list[MatrixSpectra]) -> list[Tensor]:
        """Ranks (T + 1,) per matrix."""
        settings, budget = self.settings, self.budget
        if settings.allocation == "uniform":
            return uniform(table, budget)
        if settings.allocation == "greedy":
            return greedy(table, budget)
        start = (greedy if settings.warm_start else uniform)(table, budget)
        return learn_ranks(
            table,
            budget,
            start=start,
            settings=settings.learning,
            unit=self.layout.unit_bits,
        )

    def upgrade(self, table: list[MatrixSpectra], ranks: list[Tensor]):
        """Rows, ranks and precisions after what is left was spent on finer precision."""
        options = [self.layout.precisions[row.name] for row in table]
        ladders = [
            [(p.price(*row.shape), p.rounding) for p in allowed]
            for row, allowed in zip(table, options)
        ]
        table, ranks = upgrade(table, ranks, ladders, self.budget)
        stored_as = {
            row.name: next(p for p in allowed if p.price(*row.shape) == row.price)
            for row, allowed in zip(table, options)
        }
        return table, ranks, stored_as


class _Room:
    """Memory for first-pass factors."""

    def __init__(self, settings: MergeSettings):
        self._left = settings.factor_memory_gb * 2**30

    def keep(self, kept: dict[str, Decomposition], name: str, parts: Decomposition):
        spectra: tuple[Spectrum, ...] = (parts.shared, *parts.experts)
        size = sum(4 * (p.U.numel() + p.Vh.numel()) for p in spectra)
        if size <= self._left:
            self._left -= size
            kept[name] = parts
