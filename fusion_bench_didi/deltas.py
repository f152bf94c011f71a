"""How one task's change of one tensor is stored, and how it is applied.

A delta holds exactly the tensors that are written to the file, so that its cost in bits is the size of those tensors
and nothing has to be believed. ``change(shared)`` gives the change of the weight, where ``shared`` is the delta that all
tasks share (None where there is none): most forms add their own to what that one says, some are made of it.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .lowrank.factors import LowRankFactors


class Delta(nn.Module):
    """Base of all stored forms.

    Args:
        shape: of the tensor that is changed.
    """

    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    #: parts that may be None
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: tuple[int, ...], **tensors: Tensor | None):
        super().__init__()
        self.shape = tuple(shape)
        for name in self.parts:
            if name in self.optional and tensors[name] is None:
                self.register_parameter(name, None)
                continue
            value = tensors[name].detach().contiguous()
            if value.untyped_storage().nbytes() > value.nbytes:
                # a view would keep, and be written with, the whole
                value = value.clone()
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def own(self) -> Tensor:
        """The change in float32, of shape ``self.shape``, that it stands for by itself."""
        raise NotImplementedError

    def change(self, shared: "Delta | None" = None) -> Tensor:
        """The task's whole change in float32, of shape ``self.shape``.

        Args:
            shared: the same tensor's delta of the shared part.
        """
        own = self.own()
        return own if shared is None else own + shared.change()

    def own_product(self) -> LowRankFactors | None:
        """:meth:`own` as a product (m, r) (r, n) in float32; None where it is not stored as one."""
        return None

    def product(self, shared: "Delta | None" = None) -> LowRankFactors | None:
        """:meth:`change` as a product; None where some of it is not stored as one."""
        own = self.own_product()
        if own is None or shared is None:
            return own
        other = shared.product()
        return None if other is None else own + other

    def tensors(self) -> dict[str, Tensor]:
        """What is written to the file, by part."""
        found = ((name, getattr(self, name)) for name in self.parts)
        return {name: value.detach() for name, value in found if value is not None}

    def options(self) -> dict:
        """JSON-plain constructor arguments beside shape and tensors."""
        return {}

    @property
    def bits(self) -> int:
        return sum(8 * t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, bits={self.bits}"


class DenseDelta(Delta):
    """Every entry: ``shared + value``."""

    kind = "dense"
    parts = ("value",)

    def __init__(self, shape: tuple[int, ...], value: Tensor):
        super().__init__(shape, value=value.reshape(shape))

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

    def __init__(self, shape: tuple[int, ...], up: Tensor, down: Tensor):
        super().__init__(shape, up=up, down=down)

    @classmethod
    def of(
        cls, shape: tuple[int, ...], factors: LowRankFactors, dtype: torch.dtype
    ) -> "LowRankDelta":
        return cls(shape, factors.up.to(dtype), factors.down.to(dtype))

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def own(self) -> Tensor:
        return self.own_product().dense().view(self.shape)

    def own_product(self) -> LowRankFactors:
        return LowRankFactors(self.up.float(), self.down.float())


class SpectralDelta(Delta):
    """As :class:`LowRankDelta` with the singular values kept apart: ``shared + (up * sigma) @ down``.

    Args:
        up: (m, r).
        sigma: (r,).
        down: (r, n).
    """

    kind = "spectral"
    parts = ("up", "sigma", "down")

    def __init__(self, shape: tuple[int, ...], up: Tensor, sigma: Tensor, down: Tensor):
        super().__init__(shape, up=up, sigma=sigma, down=down)

    def own(self) -> Tensor:
        return self.own_product().dense().view(self.shape)

    def own_product(self) -> LowRankFactors:
        up, sigma, down = (t.float() for t in (self.up, self.sigma, self.down))
        return LowRankFactors(up * sigma, down)


class MaskedDelta(Delta):
    """A part of what is shared, rescaled: ``scale * mask * shared``. One bit per entry.

    Args:
        mask: (ceil(numel / 8),) uint8, packed by :func:`pack_bits`.
        scale: scalar.
    """

    kind = "masked"
    parts = ("mask", "scale")

    def __init__(self, shape: tuple[int, ...], mask: Tensor, scale: Tensor):
        super().__init__(shape, mask=mask, scale=scale)

    @classmethod
    def of(cls, mask: Tensor, scale: Tensor | float = 1.0) -> "MaskedDelta":
        """From a boolean mask of the tensor's shape; the scale is kept in float32."""
        scale = torch.as_tensor(scale, dtype=torch.float32)
        return cls(tuple(mask.shape), pack_bits(mask), scale)

    def change(self, shared: Delta | None = None) -> Tensor:
        if shared is None:
            raise ValueError("A masked delta needs the shared tensor that it masks.")
        return shared.change() * unpack_bits(self.mask, self.shape) * self.scale


class SparseDelta(Delta):
    """A few entries, by position: ``values`` there, ``shared`` elsewhere.

    Args:
        where: the positions in the flattened tensor, as int32 indices in ascending order or, where that is smaller, as
            a packed bitmap (uint8); the type tells which.
        values: (nnz,).
    """

    kind = "sparse"
    parts = ("where", "values")

    def __init__(self, shape: tuple[int, ...], where: Tensor, values: Tensor):
        super().__init__(shape, where=where, values=values)

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
