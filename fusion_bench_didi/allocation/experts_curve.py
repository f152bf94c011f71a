"""Rate and distortion of low-rank experts at every rank, the dense form last.

Experts are residuals against the *truncated* shared part, ``tau_t - S_k0``, so that the error is an exact sum of their lost
singular values and no cross terms remain. Letters: ``T`` tasks, ``q`` kept singular values.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .curves import PerTaskCurve
from .spectra import MatrixSpectra, Rate, left_out


@dataclass(frozen=True)
class ExpertsCurve:
    """The curve of low-rank experts beside a shared module of fixed rank, from their spectra.

    Args:
        shared_rank: k_0.
        rate: of its precision.
        weights: (T,) of the squared errors.
        sigma: (T, q) singular values of the residuals.
        tail_energy: (T,) beyond them.
        full: the rank from which modules are stored whole, also where factors would cost less.
        rounding, rounding_dense: relative squared error that rounding adds to what is kept as factors, and whole.
    """

    shared_rank: int
    rate: Rate
    weights: Tensor
    sigma: Tensor
    tail_energy: Tensor
    full: int
    rounding: float = 0.0
    rounding_dense: float = 0.0

    @cached_property
    def curve(self) -> PerTaskCurve:
        """The curve of the matrix: experts of ranks 0, 1, ..., cap and, last, dense, and the shared part."""
        whole = self.sigma.double().square().sum(1) + self.tail_energy.double()
        cap = min(self.rate.cap, self.full - 1, self.sigma.shape[1])
        left = left_out(self.sigma, self.tail_energy, cap)
        error = left + self.rounding * (whole[:, None] - left)
        error = torch.cat([error, self.rounding_dense * whole[:, None]], 1)
        bits = torch.arange(cap + 2, dtype=torch.float64) * self.rate.per_rank
        bits[-1] = self.rate.dense
        error = self.weights.double()[:, None] * error
        if self.rate.most is not None:
            error[:, -1] = torch.inf
        return PerTaskCurve(error, bits, self.rate.of(self.shared_rank, self.full))

    @property
    def zero_rate_multiplier(self) -> float:
        return self.curve.zero_rate_multiplier

    def at(self, multiplier: float) -> tuple[float, float]:
        return self.curve.at(multiplier)

    def spectra(
        self, name: str, sides: tuple[int, int], *, shared_energy: float = 0.0
    ) -> MatrixSpectra:
        """The row of the rank allocation's table for this matrix.

        Args:
            sides: m and n.
            shared_energy: of the shared module.
        """
        energy = self.tail_energy.float()
        return MatrixSpectra(
            name,
            sides,
            sigma=torch.cat([torch.zeros_like(self.sigma[:1]), self.sigma]),
            tail_energy=torch.cat([energy.new_zeros(1), energy]),
            weights=self.weights.cpu().float(),
            rate=self.rate,
            shared_rank=self.shared_rank,
            shared_energy=shared_energy,
        )
