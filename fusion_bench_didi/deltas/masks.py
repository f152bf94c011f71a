"""Deltas by bit masks: a masked part of what is shared, and entries that replace what is shared."""

import math

import torch
from torch import Tensor, nn

from .base import Delta


class MadeOfShared(Delta):
    """Base of the forms whose change is worked out from the shared one."""

    def beyond(self, shared: Delta | None = None) -> Tensor:
        if shared is None:
            return self.change()
        shared = shared.decoded()
        return self.change(shared) - shared.change()


class MaskedDelta(MadeOfShared):
    """A part of what is shared, rescaled: ``scale * mask * shared``. One bit per entry.

    Args:
        mask: (ceil(numel / 8),) uint8, packed by :func:`pack_bits`.
        scale: scalar.
    """

    kind = "masked"
    parts = ("mask", "scale")

    @classmethod
    def of(cls, mask: Tensor, scale: Tensor | float = 1.0) -> "MaskedDelta":
        """From a boolean mask of the tensor's shape; the scale is kept in float32."""
        scale = torch.as_tensor(scale, dtype=torch.float32)
        return cls(tuple(mask.shape), pack_bits(mask), scale)

    def change(self, shared: Delta | None = None) -> Tensor:
        if shared is None:
            raise ValueError("A masked delta needs the shared tensor that it masks.")
        return shared.change() * unpack_bits(self.mask, self.shape) * self.scale


class SignedDelta(MadeOfShared):
    """What is shared under the task's signs of columns: ``shared * signs``. One bit per column.

    Args:
        negative: (ceil(columns / 8),) uint8, packed by :func:`pack_bits`; where the sign is -1.
    """

    kind = "signed"
    parts = ("negative",)

    @classmethod
    def of(cls, shape: tuple[int, ...], signs: Tensor) -> "SignedDelta":
        """From the signs of the last side, (columns,)."""
        return cls(shape, pack_bits(signs < 0).cpu())

    def change(self, shared: Delta | None = None) -> Tensor:
        if shared is None:
            raise ValueError("A signed delta needs the shared tensor that it is of.")
        negative = unpack_bits(self.negative, self.shape[-1:])
        return torch.where(negative, -1.0, 1.0) * shared.change()


class SparseDelta(MadeOfShared):
    """A few entries, by position: ``values`` there, ``shared`` elsewhere.

    Args:
        where: the positions in the flattened tensor, as int32 indices in ascending order or, where that is smaller, as
            a packed bitmap (uint8); the type tells which.
        values: (nnz,).
    """

    kind = "sparse"
    parts = ("where", "values")

    @classmethod
    def of(cls, value: Tensor, dtype: torch.dtype) -> "SparseDelta":
        """The non-zero entries of ``value``."""
        flat = value.reshape(-1)
        index = flat.nonzero().squeeze(1)
        if bitmap_is_smaller(len(index), len(flat)):
            where = pack_bits(flat != 0)
        else:
            where = index.to(torch.int32)
        return cls(tuple(value.shape), where, flat[index].to(dtype))

    def change(self, shared: Delta | None = None) -> Tensor:
        where = self.where
        if where.dtype == torch.uint8:
            where = unpack_bits(where, (self.numel,)).nonzero().squeeze(1)
        values = self.values.float()
        if shared is None:
            flat = values.new_zeros(self.numel)
        else:
            flat = shared.change().flatten()
        return flat.index_copy(0, where.long(), values).view(self.shape)


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor as (ceil(numel / 8),) uint8; entry i is bit i % 8 of byte i // 8."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << _bit_index(flat)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The boolean tensor that :func:`pack_bits` was given."""
    bits = (packed[:, None] >> _bit_index(packed)) & 1
    return bits.reshape(-1)[: math.prod(shape)].view(shape).bool()


def bitmap_is_smaller(nnz: int, numel: int) -> bool:
    """Whether a bit per entry takes less room than an int32 index per non-zero one (or the indices overflow)."""
    return numel > 2**31 or math.ceil(numel / 8) < 4 * nnz


def _bit_index(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
