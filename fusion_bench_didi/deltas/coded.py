"""Deltas of entropy-coded whole numbers: rows of a matrix, or the directions of a low-rank product (``quantization/dead_zone.py``)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import CheckpointMismatchError
from ..lowrank.factors import LowRankFactors
from ..quantization.coded_matrix import CodedMatrix, unit_rows
from ..quantization.dead_zone import decode, decode_blocks, encode, gains_of
from ..quantization.entropy import StreamError
from .base import Blocks, Delta


class CodedDelta(Delta):
    """Every entry as a whole number times one step: ``shared + values(stream) * step``.

    Args:
        stream: (size,) uint8, the numbers of all rows.
        classes: (m,) uint8, spread of each row; (1,) for a vector or a single column.
        step: (1,) float32.
    """

    kind = "coded"
    parts = ("stream", "classes", "step")

    @classmethod
    def of(cls, shape: tuple[int, ...], coded: CodedMatrix) -> "CodedDelta":
        """From the codes of its rows."""
        (rows,) = coded.sides
        step = torch.tensor([coded.step], dtype=torch.float32)
        return cls(shape, encode([rows]), rows.classes.cpu(), step)

    def own(self) -> Tensor:
        with _readable():
            (rows,) = decode(self.stream, [(self.classes, self._length)])
        return rows.mul_(self.step).view(self.shape)

    def blocks(self, shared: Delta | None = None) -> Blocks:
        if len(self.classes) != self.sides[0]:  # a column
            yield from super().blocks(shared)
            return
        parts = [(self.classes, self._length)]
        with _readable():
            for _, rows, values in decode_blocks(self.stream, parts):
                yield rows, values.mul_(self.step)

    @property
    def _length(self) -> int:
        return self.numel // max(len(self.classes), 1)


class CodedLowRankDelta(Delta):
    """A product of directions of unit length on the short side and of whole numbers times one step on the long side.

    ``shared + sum_i u_i v_i^T`` with ``u_i = g_i values_i / |values_i|`` of the short side, ``g_i`` being the gain of its class, and
    ``v_i = values_i * step``.

    Args:
        stream: (size,) uint8, the numbers of the short side, then those of the long side.
        short, long: (r,) uint8, spreads of the two vectors of each direction.
        step: (1,) float32.
    """

    kind = "coded_low_rank"
    parts = ("stream", "short", "long", "step")

    @classmethod
    def of(cls, shape: tuple[int, ...], coded: CodedMatrix) -> "CodedLowRankDelta":
        """From the codes of its short side and of its long side."""
        classes = [codes.classes.cpu() for codes in coded.sides]
        step = torch.tensor([coded.step], dtype=torch.float32)
        return cls(shape, encode(coded.sides), *classes, step)

    @property
    def rank(self) -> int:
        return len(self.short)

    def own_product(self) -> LowRankFactors:
        m, n = self.sides
        parts = zip((self.short, self.long), sorted((m, n)))
        with _readable():
            short, long = decode(self.stream, list(parts))
        unit = unit_rows(short).mul_(gains_of(self.short)[:, None])
        scaled = long.mul_(self.step)
        up, down = (scaled, unit) if m >= n else (unit, scaled)
        return LowRankFactors(up.mT.contiguous(), down)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except StreamError as error:
        raise CheckpointMismatchError(
            f"A coded tensor cannot be read: {error} Write the model again."
        ) from error
