"""Singular values and rates of one matrix: all that the allocation of ranks knows of it.

A module is one low-rank product: per matrix one shared module (index 0) and one expert per task (1..T). A module of
rank k costs ``k * per_rank``; at full rank it is stored dense for ``dense``, so ranks between the break-even point and
full rank are never used. Letters: ``T`` tasks, ``q`` kept singular values, ``k`` rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..lowrank.decomposition import Coupling, Decomposition
from ..lowrank.factors import full_rank

#: Bits for what is not to be had: more than any model takes, and sums of them stay whole numbers.
NEVER = 2**50


@dataclass(frozen=True)
class Rate:
    """What a module of one matrix costs, in bits: per unit of rank, and stored dense.

    Args:
        most: the largest rank that is allowed; there is no dense form then.
    """

    per_rank: int
    dense: int
    most: int | None = None

    @property
    def cap(self) -> int:
        """The largest rank that is allowed and costs less than the dense form."""
        cap = max((self.dense - 1) // self.per_rank, 0)
        return cap if self.most is None else min(cap, self.most)

    def limited(self, most: int | None) -> "Rate":
        """This rate up to a rank and without a dense form; unchanged if the bound is None."""
        return self if most is None else replace(self, dense=NEVER, most=most)

    def of(self, rank: int, full: int) -> int:
        return self.dense if rank >= full else rank * self.per_rank


def left_out(sigma: Tensor, tail_energy: Tensor, cap: int) -> Tensor:
    """(k, cap + 1) squared errors, float64, of modules (k,) at ranks 0, 1, ..., cap.

    Args:
        sigma: (k, q) singular values; summed from the end, so that nothing is left where nothing is.
        tail_energy: (k,) beyond them.
    """
    energy = sigma.double().square()
    left = energy.flip(1).cumsum(1).flip(1)
    left = torch.cat([left, energy.new_zeros(len(energy), 1)], 1)[:, : cap + 1]
    return left + tail_energy.double()[:, None]


@dataclass(frozen=True)
class MatrixSpectra:
    """All that the rank stage knows of one matrix.

    Args:
        shape: (m, n).
        sigma: (T + 1, q) singular values, row 0 the shared matrix.
        tail_energy: (T + 1,) energy beyond the kept values.
        weights: (T,) weight of each task's squared error in the objective.
        rate: bits per rank, and dense.
        coupling: cross terms; None to leave them out.
        shared_rank: of the shared module where it is not to be allocated; 0 for experts only.
        shared_energy: squared norm of that module, of which rounding loses a part.
    """

    name: str
    shape: tuple[int, int]
    sigma: Tensor
    tail_energy: Tensor
    weights: Tensor
    rate: Rate
    coupling: Coupling | None = None
    shared_rank: int | None = None
    shared_energy: float = 0.0

    @property
    def of_experts(self) -> tuple[Tensor, Tensor]:
        """(T, q) singular values, and (T,) energy beyond."""
        return self.sigma[1:], self.tail_energy[1:]

    @property
    def full(self) -> int:
        return full_rank(*self.shape)

    @property
    def cap(self) -> int:
        """The largest rank worth storing as factors, and known from the spectra."""
        return min(self.rate.cap, self.full - 1, self.sigma.shape[1])

    @property
    def needed(self) -> Tensor:
        """(T + 1,) the rank at which a module is exact: that of its matrix where it is known, full rank otherwise."""
        known = (self.sigma > 0).sum(1)
        return torch.where(self.tail_energy > 0, self.full, known)

    @property
    def free(self) -> range:
        """The modules whose rank is to be allocated."""
        return range(0 if self.shared_rank is None else 1, self.sigma.shape[0])

    @property
    def module_weights(self) -> Tensor:
        """(T + 1,): an error in the shared module hurts every task."""
        return torch.cat([self.weights.sum()[None], self.weights])

    def cost(self, ranks: Tensor) -> int:
        return sum(self.rate.of(int(k), self.full) for k in ranks.tolist())


def spectra_of(
    name: str,
    decomposition: Decomposition,
    *,
    weights: Tensor,
    rate: Rate,
    shape: tuple[int, int],
    shared_rank: int | None = None,
) -> MatrixSpectra:
    """The table row of one decomposed matrix."""
    parts = (decomposition.shared, *decomposition.experts)
    return MatrixSpectra(
        name=name,
        shape=shape,
        sigma=torch.stack([p.S for p in parts]).cpu(),
        tail_energy=torch.tensor([p.tail_energy for p in parts]),
        weights=weights.cpu().float(),
        rate=rate,
        coupling=decomposition.coupling,
        shared_rank=shared_rank,
    )


def total_cost(table: Sequence[MatrixSpectra], ranks: Sequence[Tensor]) -> int:
    """Bits of all modules."""
    return sum(row.cost(k) for row, k in zip(table, ranks))
