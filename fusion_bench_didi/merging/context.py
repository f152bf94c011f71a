"""What all stages of one merge read and none of them changes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed.ownership import SOLO, Crew
from ..lowrank.factored import as_dense
from ..lowrank.factors import Matrix
from ..lowrank.row_blocks import Difference, materialize, mean_of
from ..lowrank.static_merge import shared_matrix
from ..task_vectors.loop import Progress, Result, each
from ..task_vectors.parallel import HeapTrimmer
from ..task_vectors.reader import TaskVectors
from ..task_vectors.tensor import ChangedTensor
from .basis_store import BasisStore
from .given import Given
from .inventory import Inventory
from .settings import MergeSettings, Normalization

#: Powers of a task vector's energy that its error is divided by.
POWERS: dict[Normalization, float] = {"none": 0.0, "root": 0.5, "matrix": 1.0}


def loss_weights(
    energies: Mapping[str, Tensor], normalization: Normalization
) -> dict[str, Tensor]:
    """(T,) weight of each task's squared error, per matrix, of its task vectors' squared norms (T,): ``||tau||^(-2 p)``.

    ``root`` weighs by 1 / ||tau||: plain MSE spends everything on the matrices of most energy, the relative error as
    much on those that hardly moved; the mean of the two (in the exponent) kept most accuracy where it was measured.
    """
    power, weights = POWERS[normalization], {}
    for name, e in energies.items():
        # a task that leaves the matrix alone is disturbed by a shared change as much as the average task
        e = torch.where(e > 0, e, e[e > 0].mean())
        weights[name] = e.pow(-power).float()
    return weights


@dataclass(frozen=True)
class MergeContext:
    """Inputs, settings and energies of one merge, which its stages read.

    Args:
        task_vectors: tasks sorted.
        energy: (T,) squared norms of the task vectors, per tensor.
        weights: (T,) of the squared errors, per matrix.
        beyond: per tensor and precision, what rounding dense experts loses of their energy beyond what is expected.
        device: where the arithmetic happens.
        store: takes the half SVDs between planning and encoding.
        given: the finished model that is added to; None for a merge from the start.
        crew: the processes at it.
    """

    task_vectors: TaskVectors
    settings: MergeSettings
    inventory: Inventory
    energy: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    device: torch.device | str
    progress: Progress
    store: BasisStore
    given: Given | None = None
    crew: Crew = SOLO
    beyond: Mapping[str, Sequence[float]] = field(default_factory=dict)
    trimmer: HeapTrimmer = field(default_factory=HeapTrimmer)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.task_vectors.tasks)

    def tensor(self, name: str) -> ChangedTensor:
        """One tensor of all models; nothing is read yet."""
        return self.task_vectors.tensor(name, self.device)

    def sides(self, name: str) -> tuple[int, int]:
        return self.inventory.sides[name]

    def weighted_energy(self, name: str) -> float:
        """Weighted energy of all tasks' vectors."""
        return float((self.weights[name].double() * self.energy[name]).sum())

    def static_merge(self, name: str, vectors: Sequence[Matrix]) -> Matrix:
        """The whole shared matrix (m, n) of task vectors, Eq. 2."""
        return shared_matrix(
            vectors,
            how=self.settings.static,
            weights=self.weights[name],
            scale=self.settings.shared_scale,
            keep=self.settings.ties_keep,
        )

    def static_merge_of(self, name: str, differences: Sequence[Difference]) -> Tensor:
        """As :meth:`static_merge`, of differences that are formed a few rows at a time where that will do."""
        if self.settings.static == "mean":
            return mean_of(differences, self.weights[name])
        return as_dense(self.static_merge(name, [materialize(d) for d in differences]))

    def each(
        self,
        stage: str,
        function: Callable[[str], Result],
        names: Iterable[str],
        *,
        kept: bool = True,
    ) -> Iterator[tuple[str, Result]]:
        """Names and results of the one loop over tensors, on all ranks."""
        return each(
            self.task_vectors,
            stage,
            function,
            names,
            device=self.device,
            progress=self.progress,
            trimmer=self.trimmer,
            crew=self.crew,
            kept=kept,
        )
