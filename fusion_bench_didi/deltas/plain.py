"""Deltas in floating types: dense, low-rank, low-rank with singular values, and a task's own tensor."""

import torch
from torch import Tensor

from ..lowrank.factors import LowRankFactors
from .base import Delta


class DenseDelta(Delta):
    """Every entry: ``shared + value``."""

    kind = "dense"
    parts = shaped = ("value",)

    @classmethod
    def of(
        cls, shape: tuple[int, ...], value: Tensor, dtype: torch.dtype
    ) -> "DenseDelta":
        """The change in a floating type, where files are written from."""
        return cls(shape, value.to(dtype).cpu())

    def own(self) -> Tensor:
        return self.value.float()


class LowRankDelta(Delta):
    """A product of two thin factors: ``shared + up @ down``; rank 0 stores nothing.

    Args:
        up: (m, r), where m is the first side of ``shape``.
        down: (r, n), where n is the product of the other sides.
    """

    kind = "low_rank"
    parts = ("up", "down")

    @classmethod
    def of(
        cls, shape: tuple[int, ...], factors: LowRankFactors, dtype: torch.dtype
    ) -> "LowRankDelta":
        return cls(shape, factors.up.to(dtype), factors.down.to(dtype))

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def own_product(self) -> LowRankFactors:
        return LowRankFactors(self.up.float(), self.down.float())


class SpectralDelta(Delta):
    """A :class:`LowRankDelta` with its singular values kept apart: ``shared + (up * sigma) @ down``.

    Args:
        up: (m, r).
        sigma: (r,).
        down: (r, n).
    """

    kind = "spectral"
    parts = ("up", "sigma", "down")

    def own_product(self) -> LowRankFactors:
        up, sigma, down = (t.float() for t in (self.up, self.sigma, self.down))
        return LowRankFactors(up * sigma, down)


class OwnDelta(Delta):
    """The task's own tensor in place of the base model's, as its checkpoint has it: of any type, of a shape of its own.

    For heads, statistics and counters, and whatever is of one task only; nothing is shared of it.
    """

    kind = "own"
    parts = shaped = ("value",)

    def applied(self, base: Tensor, shared: Delta | None = None) -> Tensor:
        return self.value.detach()

    def change(self, shared: Delta | None = None) -> Tensor:
        raise ValueError("A tensor of a task's own is no change of the base model's.")

    own = change
