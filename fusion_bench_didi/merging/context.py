"""The matrices of one merge while they are worked on: read, decomposed as far as the budget reaches, kept for later."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..allocation.spectra import MatrixSpectra, spectra_of
from ..allocation.water_filling import dense_from
from ..deltas.precision import Precision
from ..lowrank.decomposition import Decomposition, decompose, half_decompose, half_of
from ..lowrank.factored import as_dense
from ..lowrank.factors import Matrix, full_rank
from ..lowrank.row_blocks import Difference, materialize, mean_of
from ..lowrank.static_merge import shared_matrix
from ..lowrank.svd import sketched
from ..parallel import HeapTrimmer, exclusive_if, ordered_map, workers_for
from ..task_vectors.reader import TaskVectors, matrix_shape
from .basis_store import FactorStore
from .inventory import Inventory, matrix_rate
from .metric import Metric
from .settings import MergeSettings

Progress = Callable[[str, int, int], None]

#: First guess of the largest rank in reach, in multiples of the even share; doubled where it was too small.
REACH = 2.0
#: Couplings are kept in float32 up to this size in all, in bfloat16 beyond it.
COUPLING_BYTES = 2**30
#: First guess, in parts of the short side, where every matrix may well be stored whole ...
GLANCE = 0.1
#: ... which is not looked into further if the directions seen leave out more than this part of the energy.
SPENT = 0.05


@dataclass(frozen=True)
class Work:
    """The matrices of one merge and everything that is fixed while they are worked on.

    Args:
        energy: (T,) squared norms of the task vectors, by matrix; what is stored whole is found by decompositions if none
            are given.
    """

    task_vectors: TaskVectors
    settings: MergeSettings
    inventory: Inventory
    budget: int
    weights: Mapping[str, Tensor]
    device: torch.device | str
    progress: Progress
    store: FactorStore
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    energy: Mapping[str, Tensor] = field(default_factory=dict)
    release: HeapTrimmer = field(default_factory=HeapTrimmer)

    def read(self, name: str) -> Sequence[Matrix]:
        """Task vectors of one matrix as errors are measured, T of (m, n), those of adapters as factors."""
        vectors, metric = self.task_vectors.matrices(name, self.device), self.metric(
            name
        )
        return vectors if metric is None else metric.weighed(vectors)

    def metric(self, name: str) -> Metric | None:
        """How errors of a matrix are weighed by direction; large matrices are measured plainly."""
        return None if self.task_vectors.one_by_one(name) else self.metrics.get(name)

    def shape(self, name: str) -> tuple[int, int]:
        return matrix_shape(self.task_vectors.infos[name].shape)

    def shared(self, name: str, vectors: Sequence[Matrix]) -> Matrix:
        return shared_matrix(
            vectors,
            how=self.settings.static,
            weights=self.weights[name],
            scale=self.settings.shared_scale,
            keep=self.settings.ties_keep,
        )

    def shared_of(self, name: str, terms: Sequence[Difference]) -> Tensor:
        """As :meth:`shared`, of differences that are formed a few rows at a time where that will do."""
        if self.settings.static == "mean":
            return mean_of(terms, self.weights[name])
        return as_dense(self.shared(name, [materialize(pair) for pair in terms]))

    def cap(self, name: str) -> int:
        """The largest rank that the price, the budget and the task vectors' own ranks allow for a matrix."""
        rate = matrix_rate(self.inventory, self.task_vectors, name)
        full = full_rank(*self.shape(name))
        if self._factored(name):
            full = min(full, self.task_vectors.joint_rank(name))
        return max(min(rate.cap, full, self.budget // rate.per_rank), 1)

    def _factored(self, name: str) -> bool:
        """Whether task vectors, their shared part and what it leaves of them all are of low rank."""
        return self.task_vectors.factored(name) and self.settings.static != "ties"

    def share(self, name: str) -> float:
        """Bits of one expert if every number of every task vector got as many."""
        numel = {n: self.task_vectors.infos[n].numel for n in self.inventory.matrices}
        tasks = len(self.task_vectors.tasks)
        return self.budget * numel[name] / sum(numel.values()) / tasks

    def glanced(self, name: str) -> bool:
        """Whether the even share is enough to store the matrix whole, in its cheapest precision."""
        rate = matrix_rate(self.inventory, self.task_vectors, name)
        return self.share(name) >= rate.dense

    def first_guess(self, name: str) -> int:
        """The largest rank that a matrix will probably be given: somewhat more than its even share.

        Where the exact decomposition is as cheap, or all task vectors are factored, its whole reach. Where the even
        share is enough to store the matrix whole, a glance that finds task vectors of low rank.
        """
        m, n = self.shape(name)
        if self._factored(name):
            return self.cap(name)
        rate = matrix_rate(self.inventory, self.task_vectors, name)
        cap, kind = self.cap(name), torch.device(self.device).type
        guess = REACH * self.share(name) / rate.per_rank
        guess = int(GLANCE * min(m, n) if self.glanced(name) else guess) + 8
        return guess if guess < cap and sketched((m, n), guess, device=kind) else cap

    def large_first(self, names: Iterable[str]) -> list[str]:
        """So that no core waits for a large matrix while the others are done with theirs; sorted within a size."""
        size = self.task_vectors.infos
        return sorted(names, key=lambda name: (-size[name].numel, name))

    def over(
        self, stage: str, function: Callable, names: Sequence[str]
    ) -> Iterator[tuple[str, object]]:
        """Names and results, large matrices first, with progress."""

        def one(name: str):
            with exclusive_if(self.task_vectors.large(name)):
                return function(name)

        names = self.large_first(names)
        results = ordered_map(one, names, workers=workers_for(self.device))
        for i, (name, result) in enumerate(zip(names, results)):
            self.progress(stage, i, len(names))
            yield name, result

    def rows(
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
            self.release()
            table.append(self._row(name, parts, stored_as[name], fixed[name]))
        return table

    @property
    def coupling_bytes(self) -> int:
        """What the couplings of all matrices take in float32, as far as the budget reaches."""
        reach = (self.cap(name) for name in self.inventory.matrices)
        return 4 * len(self.task_vectors.tasks) * sum(q**2 for q in reach)

    def _decompose(self, name: str, reach: int, fixed: int | None) -> Decomposition:
        vectors, settings = self.read(name), self.settings
        if fixed == 0:
            return half_decompose(vectors, None, max_rank=reach, name=name)
        shared = self.shared(name, vectors)
        if fixed is None and settings.allocation == "learned":
            if settings.learning.coupled:
                whole = decompose(vectors, shared, max_rank=reach, name=name)
                if self.coupling_bytes > COUPLING_BYTES:
                    whole = replace(whole, coupling=whole.coupling.reduced())
                return half_of(whole)
        return half_decompose(
            vectors, shared, shared_rank=fixed, max_rank=reach, name=name
        )

    def _row(
        self, name: str, parts: Decomposition, precision: Precision, fixed: int | None
    ) -> MatrixSpectra:
        shape = self.shape(name)
        return spectra_of(
            name,
            parts,
            weights=self.weights[name],
            rate=precision.rate(*shape),
            shape=shape,
            shared_rank=fixed,
        )

    def extended(
        self,
        table: list[MatrixSpectra],
        ranks: Sequence[Tensor],
        stored_as: Mapping[str, Precision],
        *,
        but: Container[str] = (),
    ) -> list[MatrixSpectra] | None:
        """The table with longer spectra where the ranks came to the end of them; None if they nowhere did.

        Args:
            but: matrices that are left as they are.
        """
        reach, fixed = {}, {}
        for row, k in zip(table, ranks):
            known = row.sigma.shape[1]
            if row.name in but:
                continue
            if known < self.cap(row.name) and self._beyond(row, k):
                longer = max(2 * known, self.first_guess(row.name))
                reach[row.name] = min(longer, self.cap(row.name))
                fixed[row.name] = row.shared_rank
        if not reach:
            return None
        longer = {row.name: row for row in self.rows("extend", reach, stored_as, fixed)}
        return [
            replace(longer[row.name], rate=row.rate) if row.name in longer else row
            for row in table
        ]

    def _beyond(self, row: MatrixSpectra, ranks: Tensor) -> bool:
        """Whether a longer spectrum might be put to use."""
        known, glanced = row.sigma.shape[1], self.glanced(row.name)
        for j in row.free:
            if known <= ranks[j] < row.full and row.tail_energy[j] > 0:
                return True
            if ranks[j] >= row.full:
                rest = float(row.tail_energy[j])
                seen = float(row.sigma[j].double().square().sum())
                if rest < SPENT * (rest + seen):
                    return True
                if not glanced and dense_from(row, j)[0] >= known:
                    return True
        return False
