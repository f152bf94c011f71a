"""Deltas of few bits per value."""

import torch
from torch import Tensor

from ..lowrank.factors import LowRankFactors
from ..quantization.codes import levels, pack_codes, packed_size
from ..quantization.rounding import RoundedFactors, RoundedMatrix
from .base import Blocks, Delta, row_blocks
from .entries import UniformDelta, between_ends


class RoundedLowRankDelta(Delta):
    """A low-rank product with integer factors and one float32 scale per direction: ``shared + (up * scale) @ down``.

    Args:
        up, down: (m, r) and (r, n) codes, stored as ``quantization/codes.py`` says.
        scale: (r,).
        bits: of a code.
    """

    kind = "rounded_low_rank"
    parts = ("up", "down", "scale")
    numbers = {"bits": "width"}

    @classmethod
    def of(
        cls, shape: tuple[int, ...], factors: RoundedFactors
    ) -> "RoundedLowRankDelta":
        bits = factors.bits
        up, down = (pack_codes(codes, bits) for codes in (factors.up, factors.down))
        return cls(shape, up, down, factors.scale, bits)

    @property
    def rank(self) -> int:
        return self.scale.shape[0]

    def scaled_product(
        self, shared: Delta | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        m, n = self.sides
        up = levels(self.up, self.width, (m, self.rank), dtype)
        down = levels(self.down, self.width, (self.rank, n), dtype)
        return up, self.scale, down

    def own_product(self) -> LowRankFactors:
        up, scale, down = self.scaled_product(None, torch.float32)
        return LowRankFactors(up * scale, down)


class RoundedDenseDelta(Delta):
    """Every entry as an integer code with one float32 scale per row of the matrix: ``shared + level * scale``.

    Args:
        codes: of the tensor's shape, stored as ``quantization/codes.py`` says.
        scale: (m,); (1,) for a vector or a single column.
        bits: of a code.
    """

    kind = "rounded_dense"
    parts = ("codes", "scale")
    numbers = {"bits": "width"}

    @classmethod
    def of(cls, shape: tuple[int, ...], rounded: RoundedMatrix) -> "RoundedDenseDelta":
        codes = rounded.codes if rounded.bits < 8 else rounded.codes.view(shape)
        return cls(shape, codes, rounded.scale, rounded.bits)

    def own(self) -> Tensor:
        value = levels(self.codes, self.width, self.shape)
        value.view(len(self.scale), -1).mul_(self.scale[:, None])
        return value

    def blocks(self, shared: Delta | None = None) -> Blocks:
        (m, n), codes = self.sides, self.codes.reshape(-1)
        for rows in row_blocks(m, n):
            first = rows.start * n * self.width // 8
            last = packed_size(rows.stop * n, self.width)
            shape = rows.stop - rows.start, n
            values = levels(codes[first:last], self.width, shape)
            scale = self.scale if len(self.scale) == 1 else self.scale[rows]
            yield rows, values.mul_(scale[:, None])


class AffineDelta(UniformDelta):
    """Every entry as an 8-bit code between two ends, in the tensor's shape: ``shared + lo + codes * (hi - lo) / 255``.

    ``q = round((w - lo) / (hi - lo) * 255)``, clamped; an error of at most ``(hi - lo) / 510`` inside the range.

    Args:
        codes: of the tensor's shape, uint8.
        ends: (2,) float32, ``lo`` and ``hi``.
    """

    kind = "affine8"
    shaped = ("codes",)
    numbers = {}
    width = 8

    @classmethod
    def of(cls, value: Tensor, *, clip: float = 0.0) -> "AffineDelta":
        """Round a tensor after shrinking its range.

        Args:
            clip: fraction of the entries that may lie beyond each end; 0 keeps the whole range.
        """
        value = value.detach().float().cpu()
        codes, ends = between_ends(value, 8, torch.stack(shrunk_range(value, clip)))
        return cls(tuple(value.shape), codes.to(torch.uint8), ends)


def shrunk_range(value: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The entries of rank ``floor(clip n)`` from below and from above."""
    flat = value.reshape(-1)
    skip = min(int(clip * len(flat)), (len(flat) - 1) // 2)
    if skip == 0:
        return flat.min(), flat.max()
    return flat.kthvalue(skip + 1).values, flat.kthvalue(len(flat) - skip).values
