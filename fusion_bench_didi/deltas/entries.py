"""Deltas of entries by themselves, as whole numbers between two ends: of all, of some by position, of some at random.

A code c of b bits stands for ``lo + c (hi - lo) / (2^b - 1)``; without ends, values are floating-point numbers as they are.
"""

import torch
from torch import Tensor

from ..errors import CheckpointMismatchError
from ..quantization.codes import pack_codes, packed_size, unpack_codes
from ..quantization.counters import random_words
from ..quantization.entropy import decode, encode, frequencies
from .base import Delta

#: Numbers of bits that a code between two ends may have.
CODE_WIDTHS = (1, 2, 3, 4, 8)


def between_ends(
    value: Tensor, width: int, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest codes, of the same shape, and (2,) the ends: the smallest and the largest value where none are given."""
    if ends is None:
        ends = torch.stack(torch.aminmax(value.float()))
    step = (ends[1] - ends[0]) / (2**width - 1)
    codes = (value - ends[0]) / step if step > 0 else torch.zeros_like(value)
    return codes.round().clamp(0, 2**width - 1).to(torch.int16), ends


def signs(value: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """One-bit codes of the same shape, 0 for a negative entry, and (2,) ends at minus and plus the scale."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=value.device)
    return (value >= 0).to(torch.int16), torch.stack([-scale, scale])


class UniformDelta(Delta):
    """Every entry as a code: ``shared + lo + codes * step``.

    Args:
        codes: (packed_size,) uint8, without gaps, low bits first.
        ends: (2,) float32.
        width: bits of a code.
    """

    kind = "uniform"
    parts = ("codes", "ends")
    numbers = {"width": "width"}

    @classmethod
    def of(cls, codes: Tensor, ends: Tensor, width: int) -> "UniformDelta":
        """From codes in the tensor's shape."""
        packed = _packed(codes.cpu(), width)
        return cls(tuple(codes.shape), packed, ends.cpu(), width)

    def own(self) -> Tensor:
        codes = self.codes.reshape(-1)
        return _levels(codes, self.ends, self.width, self.numel).view(self.shape)


class _SomeEntries(Delta):
    """Values at some positions of the flattened tensor, in ascending order; nothing elsewhere."""

    optional = ("ends",)
    values: Tensor
    ends: Tensor | None
    width: int

    def kept(self) -> Tensor:
        """(numel,) which entries have a value, boolean."""
        raise NotImplementedError

    def own(self) -> Tensor:
        index = self.kept().nonzero().squeeze(1)
        values = _levels(self.values, self.ends, self.width, len(index))
        flat = values.new_zeros(self.numel)
        return flat.index_copy_(0, index, values).view(self.shape)


class ScatteredDelta(_SomeEntries):
    """A few entries by position: ``shared + values`` there. Positions take the entropy of their share.

    Args:
        where: (size,) uint8, which of the flattened entries have a value, coded by ``quantization/entropy.py``.
        table: (2,) uint16 for that.
        values: (nnz,) floating, or packed codes (uint8).
        ends: (2,) float32; None for floating values.
        width: bits of a code or of a floating value.
    """

    kind = "scattered"
    parts = ("where", "table", "values", "ends")
    numbers = {"width": "width"}

    @classmethod
    def of(
        cls, kept: Tensor, values: Tensor, ends: Tensor | None, width: int
    ) -> "ScatteredDelta":
        """From a boolean mask of the tensor's shape, and codes or floats of its true entries in order."""
        kept = kept.int()
        table = frequencies(kept, 2)
        where, parts = encode(kept, table), _stored(values, ends, width)
        return cls(tuple(kept.shape), where, table, *parts, width)

    def kept(self) -> Tensor:
        where = decode(self.where, self.table, self.numel).bool()
        return where.to(self.values.device)


class SeededDelta(_SomeEntries):
    """Entries drawn at random, whose positions nobody stores: entry i has a value where word i of the seed is small.

    Args:
        values, ends, width: as of a :class:`ScatteredDelta`.
        seed: of :func:`random_words`.
        keep: smaller words than this have a value; ``2^32`` times the share.
    """

    kind = "seeded"
    parts = ("values", "ends")
    numbers = {"width": "width", "seed": "seed", "keep": "keep"}

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        values: Tensor,
        ends: Tensor | None,
        width: int,
        *,
        seed: int,
        keep: int,
    ) -> "SeededDelta":
        """From codes or floats of the entries that :func:`drawn` tells, in order."""
        return cls(shape, *_stored(values, ends, width), width, seed, keep)

    def kept(self) -> Tensor:
        return drawn(self.seed, self.keep, self.numel, self.values.device)


def drawn(
    seed: int, keep: int, numel: int, device: torch.device | str = "cpu"
) -> Tensor:
    """(numel,) which entries are kept at random, boolean."""
    return random_words(seed, numel, device) < keep


def _stored(
    values: Tensor, ends: Tensor | None, width: int
) -> tuple[Tensor, Tensor | None]:
    if ends is None:
        return values.cpu(), None
    return _packed(values.cpu(), width), ends.cpu()


def _packed(codes: Tensor, width: int) -> Tensor:
    if width == 8:
        return codes.flatten().to(torch.uint8)
    return pack_codes((codes - 2 ** (width - 1)).to(torch.int8), width)


def _levels(stored: Tensor, ends: Tensor | None, width: int, count: int) -> Tensor:
    """(count,) float32, what stored values stand for.

    Raises:
        CheckpointMismatchError: if there are more or fewer of them.
    """
    expected = count if ends is None else packed_size(count, width)
    if len(stored) != expected:
        raise CheckpointMismatchError(
            f"{len(stored)} stored values are not those of {count} entries of {width} bits. Write the model again."
        )
    if ends is None:
        return stored.float()
    if width == 8:
        codes = stored.float()
    else:
        codes = unpack_codes(stored, width, (count,)).float().add_(2 ** (width - 1))
    lo, hi = ends.float()
    return codes.mul_((hi - lo) / (2**width - 1)).add_(lo)
