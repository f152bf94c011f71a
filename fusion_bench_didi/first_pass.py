"""The first pass over the matrices: decompose, decide what to share and in how many bits, allocate ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .factor_store import FactorStore
from .layout import Layout, MergeSettings, matrix_price
from .lowrank import (
    Candidate,
    Decomposition,
    MatrixSpectra,
    choose,
    decompose,
    energy_of,
    full_rank,
    greedy,
    halved,
    halves,
    leading,
    learn_ranks,
    shared_matrix,
    sharing,
    singular_values,
    sketched,
    spectra_of,
    uniform,
    upgrade,
    water_level,
    whole_from,
)
from .parallel import alone, ordered_map, release_memory, workers_for
from .precision import Precision
from .task_vectors import Scan, TaskVectors, matrix_shape

Progress = Callable[[str, int, int], None]

#: First guess of the largest rank in reach, in multiples of the even share; doubled where it was too small.
REACH = 2.0
#: First guess, in parts of the short side, where every matrix may well be stored whole ...
GLANCE = 0.1
#: ... which is not looked into further if the directions seen leave out more than this part of the energy.
SPENT = 0.05
#: Sharing is looked into where the leading shared directions hold this much more than unrelated tasks would give.
WORTH_SHARING = 1.5


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
    store: FactorStore

    def read(self, name: str) -> Sequence[Tensor]:
        """Task vectors of one matrix, T of (m, n)."""
        return self.task_vectors.matrices(name, self.device)

    def shape(self, name: str) -> tuple[int, int]:
        return matrix_shape(self.task_vectors.infos[name].shape)

    def shared(self, name: str, vectors: Sequence[Tensor]) -> Tensor:
        return shared_matrix(
            vectors,
            how=self.settings.shared,
            weights=self.weights[name],
            scale=self.settings.shared_scale,
            keep=self.settings.ties_keep,
        )

    def cap(self, name: str) -> int:
        """The largest rank that the price and the budget allow for a matrix."""
        price = matrix_price(self.layout, self.task_vectors, name)
        full = full_rank(*self.shape(name))
        return max(min(price.cap, full, self.budget // price.per_rank), 1)

    def _share(self, name: str) -> float:
        """Bits of one expert if every number of every task vector got as many."""
        numel = {n: self.task_vectors.infos[n].numel for n in self.layout.matrices}
        tasks = len(self.task_vectors.tasks)
        return self.budget * numel[name] / sum(numel.values()) / tasks

    def _glanced(self, name: str) -> bool:
        """Whether the even share is enough to store the matrix whole, in its cheapest precision."""
        price = matrix_price(self.layout, self.task_vectors, name)
        return self._share(name) >= price.dense

    def first_guess(self, name: str) -> int:
        """The largest rank that a matrix will probably be given: somewhat more than its even share.

        Where the exact decomposition is as cheap, its whole reach. Where the even share is enough to store the matrix
        whole, a glance that finds task vectors of low rank.
        """
        m, n = self.shape(name)
        price = matrix_price(self.layout, self.task_vectors, name)
        cap, kind = self.cap(name), torch.device(self.device).type
        guess = REACH * self._share(name) / price.per_rank
        guess = int(GLANCE * min(m, n) if self._glanced(name) else guess) + 8
        return guess if guess < cap and sketched((m, n), guess, device=kind) else cap

    def over(
        self, stage: str, function: Callable, names: Sequence[str]
    ) -> Iterator[tuple[str, object]]:
        """Names and results, in order, with progress."""

        def one(name: str):
            with alone(self.task_vectors.large(name)):
                return function(name)

        results = ordered_map(one, names, workers=workers_for(self.device))
        for i, (name, result) in enumerate(zip(names, results)):
            self.progress(stage, i, len(names))
            yield name, result

    def first_pass(self) -> tuple[list[MatrixSpectra], dict[str, Precision]]:
        """Table rows and the precision per matrix; bases go to the store."""
        if self.settings.joint:
            return self._joint_pass()
        fixed = 0 if self.settings.shared == "none" else None
        stored_as = {n: self.layout.precisions[n][0] for n in self.layout.matrices}
        reach = {name: self.first_guess(name) for name in self.layout.matrices}
        table = self._rows("decompose", reach, stored_as, dict.fromkeys(reach, fixed))
        return table, stored_as

    def _rows(
        self,
        stage: str,
        reach: Mapping[str, int],
        stored_as: Mapping[str, Precision],
        fixed: Mapping[str, int | None],
    ) -> list[MatrixSpectra]:
        """Decompose matrices up to the ranks given, against the whole of S or S cut to a fixed rank."""

        def one(name: str) -> Decomposition:
            return self._decompose(name, reach[name], fixed[name])

        table = []
        for name, parts in self.over(stage, one, list(reach)):
            self.store.put(name, (parts.shared, *parts.experts))
            release_memory()
            table.append(self._row(name, parts, stored_as[name], fixed[name]))
        return table

    def _decompose(self, name: str, reach: int, fixed: int | None) -> Decomposition:
        vectors, settings = self.read(name), self.settings
        if fixed == 0:
            return halves(vectors, None, max_rank=reach, name=name)
        shared = self.shared(name, vectors)
        if fixed is None and settings.allocation == "learned":
            if settings.learning.coupled:
                return halved(decompose(vectors, shared, max_rank=reach, name=name))
        return halves(vectors, shared, shared_rank=fixed, max_rank=reach, name=name)

    def extended(
        self,
        table: list[MatrixSpectra],
        ranks: Sequence[Tensor],
        stored_as: Mapping[str, Precision],
    ) -> list[MatrixSpectra] | None:
        """The table with longer spectra where the ranks came to the end of them; None if they nowhere did."""
        reach, fixed = {}, {}
        for row, k in zip(table, ranks):
            known = row.sigma.shape[1]
            if known < self.cap(row.name) and self._beyond(row, k):
                reach[row.name] = min(2 * known, self.cap(row.name))
                fixed[row.name] = row.fixed_shared
        if not reach:
            return None
        longer = {
            row.name: row for row in self._rows("extend", reach, stored_as, fixed)
        }
        return [
            replace(longer[row.name], price=row.price) if row.name in longer else row
            for row in table
        ]

    def _beyond(self, row: MatrixSpectra, ranks: Tensor) -> bool:
        """Whether a longer spectrum might be put to use."""
        known, glanced = row.sigma.shape[1], self._glanced(row.name)
        for j in row.free:
            if known <= ranks[j] < row.full:
                return True
            if ranks[j] >= row.full:
                rest = float(row.tail_energy[j])
                seen = float(row.sigma[j].double().square().sum())
                if rest < SPENT * (rest + seen):
                    return True
                if not glanced and whole_from(row, j)[0] >= known:
                    return True
        return False

    def _joint_pass(self):
        """Choose shared rank and precision per matrix first (``lowrank.candidates``), then decompose against them."""
        names = self.layout.matrices
        cheapest = {n: self.layout.precisions[n][0] for n in names}
        alone = dict.fromkeys(names, 0)
        reach = {name: self.first_guess(name) for name in names}
        table = self._rows("decompose", reach, cheapest, alone)
        while longer := self.extended(table, greedy(table, self.budget), cheapest):
            table = longer
        own = {row.name: self._candidate(row) for row in table}
        level = water_level(
            [c.sigma for c in own.values()],
            [self.weights[n] for n in names],
            [c.price for c in own.values()],
            self.budget,
        )
        sharable = self.settings.residual == "truncated" and level > 0
        options = [[own[n]] for n in names]
        if sharable and self.settings.shared != "none":
            shared = self.over("share", lambda n: self._shared(n, own[n], level), names)
            options = [[own[n], *more] for n, more in shared]
        options = [
            [
                replace(
                    c,
                    price=p.price(*self.shape(n)),
                    precision=p.name,
                    rounding=p.rounding,
                    rounding_dense=p.rounding_dense,
                )
                for c in row
                for p in self.layout.precisions[n]
            ]
            for n, row in zip(names, options)
        ]
        picks = choose(options, [self.weights[n] for n in names], self.budget)
        chosen = {n: row[i] for n, row, i in zip(names, options, picks)}
        stored_as = {
            n: next(p for p in self.layout.precisions[n] if p.name == c.precision)
            for n, c in chosen.items()
        }
        mixed = {n: c.shared_rank for n, c in chosen.items() if c.shared_rank}
        reach = {n: chosen[n].sigma.shape[1] for n in mixed}
        with_shared = self._rows("share", reach, stored_as, mixed)
        rows = {row.name: row for row in (*table, *with_shared)}
        return [
            replace(rows[n], price=stored_as[n].price(*self.shape(n))) for n in names
        ], stored_as

    def _shared(self, name: str, own: Candidate, level: float) -> list[Candidate]:
        """What might pay beside experts only, in the same precision."""
        vectors, weights = self.read(name), self.weights[name]
        q = own.sigma.shape[1]
        shared = self.shared(name, vectors)
        found = leading(shared, max_rank=q, name=name)
        mean = found.S.cpu()
        gain = weights.sum() * mean.square() / own.price.per_rank
        # a shared component gains at most this much per bit; where it gains T levels, every expert would hold it too
        ranks = {int((gain >= level * times).sum()) for times in (1, len(weights))}
        candidates = []
        for k in sorted(ranks - {0}):
            if sharing(mean, own.sigma, weights, k) < WORTH_SHARING:
                continue
            cut = found.factors(shared, k).dense()
            sigma, tails = [], []
            for tau in vectors:
                rest = tau - cut
                values = singular_values(rest, max_rank=q).cpu()
                energy = energy_of(rest)
                tails.append(
                    max(float(energy) - float(values.double().square().sum()), 0)
                )
                sigma.append(values)
            candidates.append(
                replace(
                    own,
                    shared_rank=k,
                    sigma=torch.stack(sigma),
                    tail_energy=torch.tensor(tails),
                )
            )
        return candidates

    def _candidate(self, row: MatrixSpectra) -> Candidate:
        """Experts only, in the cheapest precision."""
        precision = self.layout.precisions[row.name][0]
        return Candidate(
            0,
            row.price,
            precision.name,
            row.sigma[1:],
            row.tail_energy[1:],
            precision.rounding,
            precision.rounding_dense,
        )

    def _row(
        self, name: str, parts: Decomposition, precision: Precision, fixed: int | None
    ) -> MatrixSpectra:
        shape = self.shape(name)
        return spectra_of(
            name,
            parts,
            weights=self.weights[name],
            price=precision.price(*shape),
            shape=shape,
            fixed_shared=fixed,
        )

    def allocate(self, table: list[MatrixSpectra]) -> list[Tensor]:
        """Ranks (T + 1,) per matrix.

        Where every shared rank is fixed no cross terms are left, greedy is the optimum and there is nothing to learn.
        """
        settings, budget = self.settings, self.budget
        if settings.allocation == "uniform":
            return uniform(table, budget)
        settled = all(row.fixed_shared is not None for row in table)
        if settings.allocation == "greedy" or (settled and settings.warm_start):
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
