"""Rate and distortion of low-rank experts at every rank, the dense form last.

Experts are residuals against the *truncated* shared part, ``tau_t - S_k0``, so that the error is an exact sum of their lost
singular values and no cross terms remain. Letters: ``T`` tasks, ``q`` kept singular values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .curves import PerTaskCurve
from .spectra import MatrixSpectra, Rate


@dataclass(frozen=True)
class ExpertsCurve:
    """The curve of low-rank experts beside a shared module of fixed rank, from their spectra.

    Args:
        shared_rank: k_0.
        rate: of its precision.
        precision: name of the precision.
        sigma: (T, q) singular values of the residuals.
        tail_energy: (T,) beyond them.
        full: the rank from which modules are stored whole, also where factors would cost less.
        rounding, rounding_dense: relative squared error that rounding adds to what is kept as factors, and whole.
    """

    shared_rank: int
    rate: Rate
    precision: str
    sigma: Tensor
    tail_energy: Tensor
    full: int
    rounding: float = 0.0
    rounding_dense: float = 0.0

    def curve(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted error (T, K) and bits (K,) of an expert at ranks 0, 1, ..., cap and, last, dense."""
        energy = self.sigma.double().square()
        whole = energy.sum(1) + self.tail_energy.double()
        cap = min(self.rate.cap, self.full - 1, energy.shape[1])
        # summed from the end, so that nothing is left where nothing is
        left = energy.flip(1).cumsum(1).flip(1)
        left = torch.cat([left, energy.new_zeros(len(energy), 1)], 1)[:, : cap + 1]
        left = left + self.tail_energy.double()[:, None]
        error = left + self.rounding * (whole[:, None] - left)
        error = torch.cat([error, self.rounding_dense * whole[:, None]], 1)
        bits = torch.arange(cap + 2, dtype=torch.float64) * self.rate.per_rank
        bits[-1] = self.rate.dense
        error = weights.double()[:, None] * error
        if self.rate.most is not None:
            error[:, -1] = torch.inf
        return error, bits

    def weighted(self, weights: Tensor) -> PerTaskCurve:
        """The curve of the matrix: one rank per expert, and the shared part.

        Args:
            weights: (T,).
        """
        shared = self.rate.of(self.shared_rank, self.full)
        return PerTaskCurve(*self.curve(weights), shared)

    def spectra(
        self,
        name: str,
        sides: tuple[int, int],
        weights: Tensor,
        *,
        shared_energy: float = 0.0,
    ) -> MatrixSpectra:
        """The row of the rank allocation's table for this matrix.

        Args:
            sides: m and n.
            weights: (T,).
            shared_energy: of the shared module.
        """
        energy = self.tail_energy.float()
        return MatrixSpectra(
            name,
            sides,
            sigma=torch.cat([torch.zeros_like(self.sigma[:1]), self.sigma]),
            tail_energy=torch.cat([energy.new_zeros(1), energy]),
            weights=weights.cpu().float(),
            rate=self.rate,
            shared_rank=self.shared_rank,
            shared_energy=shared_energy,
        )
