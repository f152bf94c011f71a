"""How far spectra have to be known under a budget, before anything is decomposed."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ..lowrank.factors import full_rank
from ..lowrank.svd import sketched
from ..task_vectors.reader import TaskVectors
from .inventory import Inventory
from .settings import MergeSettings

#: First guess of the largest rank in reach, in multiples of the even share; doubled where it was too small.
REACH = 2.0
#: First guess, in parts of the short side, where every matrix may well be stored dense.
GLANCE = 0.1


@dataclass(frozen=True)
class RankBounds:
    """Ranks that matrices may be given at most, and probably.

    Args:
        budget: bits for all matrices.
        device: where they are decomposed.
    """

    task_vectors: TaskVectors
    inventory: Inventory
    settings: MergeSettings
    budget: int
    device: torch.device | str

    @cached_property
    def _numel(self) -> int:
        """Entries of all matrices."""
        return sum(map(self.inventory.numel, self.inventory.matrices))

    def rank_bound(self, name: str) -> int:
        """The largest rank that the rate, the budget and the task vectors' own ranks allow for a matrix."""
        rate, full = self.inventory.rate(name), full_rank(*self.inventory.sides[name])
        if self._factored(name):
            full = min(full, self.task_vectors.joint_rank(name))
        return max(min(rate.cap, full, self.budget // rate.per_rank), 1)

    def even_share(self, name: str) -> float:
        """Bits of one expert if every number of every task vector got as many."""
        tasks = len(self.task_vectors.tasks)
        return self.budget * self.inventory.numel(name) / self._numel / tasks

    def even_share_pays_dense(self, name: str) -> bool:
        """Whether the even share is enough to store the matrix dense, in its cheapest precision."""
        return self.even_share(name) >= self.inventory.rate(name).dense

    def initial_rank(self, name: str) -> int:
        """The largest rank that a matrix will probably be given: somewhat more than its even share.

        Where the exact decomposition is as cheap, or all task vectors are factored, its bound. Where the even share is
        enough to store the matrix dense, as much as finds task vectors of low rank.
        """
        if self._factored(name):
            return self.rank_bound(name)
        guess = REACH * self.even_share(name) / self.inventory.rate(name).per_rank
        if self.even_share_pays_dense(name):
            guess = GLANCE * min(self.inventory.sides[name])
        return self.reach(name, int(guess) + 8)

    def reach(self, name: str, rank: int) -> int:
        """A rank up to which a matrix is to be decomposed; its bound where the exact decomposition is as cheap."""
        bound, sides = self.rank_bound(name), self.inventory.sides[name]
        kind = torch.device(self.device).type
        short = rank < bound and sketched(sides, rank, device=kind)
        return rank if short else bound

    def _factored(self, name: str) -> bool:
        """Whether task vectors, their shared part and what it leaves of them all are of low rank."""
        return self.task_vectors.factored(name) and self.settings.static != "ties"
