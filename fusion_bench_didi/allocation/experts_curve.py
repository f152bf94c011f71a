"""Choices per matrix that are made together with the ranks: what is shared, how, and in how many bits.

A candidate is one form of a matrix in one precision. *Experts* fix the shared module's rank k_0 and are residuals against the
*truncated* shared part, ``tau_t - S_k0``, so that the error is an exact sum of their lost singular values and no cross
terms remain; *common subspaces* (``common.py``) have two sizes instead of ranks. For a multiplier ``mu`` (error per bit) the
best ranks or sizes of every candidate are known in closed form; the best candidate per matrix follows, and ``mu`` is the
smallest that meets the budget. Experts with ``k_0 = 0`` are always among the candidates, so anything is only shared where it
pays. Letters: ``T`` tasks, ``q`` kept singular values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .lagrangian import Curve
from .spectra import Rate


@dataclass(frozen=True)
class ExpertsCurve:
    """One way to store a matrix as experts on a shared module.

    Args:
        shared_rank: k_0.
        price: of its precision.
        precision: name of the precision.
        sigma: (T, q) singular values of the residuals.
        tail_energy: (T,) beyond them.
        rounding, rounding_dense: relative squared error that rounding adds to what is kept as factors, and whole.
    """

    shared_rank: int
    rate: Rate
    precision: str
    sigma: Tensor
    tail_energy: Tensor
    rounding: float = 0.0
    rounding_dense: float = 0.0

    def curve(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted error (T, K) and bits (K,) of an expert at ranks 0, 1, ..., cap and, last, dense."""
        energy = self.sigma.double().square()
        whole = energy.sum(1) + self.tail_energy.double()
        cap = min((self.rate.dense - 1) // self.rate.per_rank, energy.shape[1])
        # summed from the end, so that nothing is left where nothing is
        left = energy.flip(1).cumsum(1).flip(1)
        left = torch.cat([left, energy.new_zeros(len(energy), 1)], 1)[:, : cap + 1]
        left = left + self.tail_energy.double()[:, None]
        error = left + self.rounding * (whole[:, None] - left)
        error = torch.cat([error, self.rounding_dense * whole[:, None]], 1)
        bits = torch.arange(cap + 2, dtype=torch.float64) * self.rate.per_rank
        bits[-1] = self.rate.dense
        return weights.double()[:, None] * error, bits

    def ranks(self, weights: Tensor, mu: float, full: int) -> Tensor:
        """(T,) of the experts where ``error + mu * bits`` is least; ``full`` where they are whole.

        Args:
            weights: (T,).
        """
        error, bits = self.curve(weights)
        best = (error + mu * bits).argmin(1)
        return torch.where(best == len(bits) - 1, full, best)

    def offer(self, weights: Tensor) -> Curve:
        """
        Args:
            weights: (T,).
        """
        shared = min(self.shared_rank * self.rate.per_rank, self.rate.dense)
        return _Experts(*self.curve(weights), shared)


@dataclass(frozen=True)
class _Experts:
    """Error (T, K) and bits (K,) of each expert, and the bits of the shared module."""

    error: Tensor
    bits: Tensor
    shared: int

    @property
    def zero_rate_multiplier(self) -> float:
        return float((self.error[:, :1] / self.bits[1]).max())

    def at(self, mu: float) -> tuple[float, float]:
        ranks = (self.error + mu * self.bits).argmin(1)  # (T,)
        lost = float(self.error.gather(1, ranks[:, None]).sum())
        return lost, float(self.bits[ranks].sum()) + self.shared
