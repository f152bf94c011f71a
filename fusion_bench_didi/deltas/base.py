"""The base class of deltas: how one task's change of one tensor is stored, and how it is applied.

A delta holds exactly the tensors that are written to the file, so that its cost in bits is the size of those tensors
and nothing has to be believed. ``change(shared)`` gives the change of the weight, where ``shared`` is the delta that all
tasks share (None where there is none): most forms add their own to what that one says, some are made of it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter, Signature, signature
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..lowrank.factors import LowRankFactors
from ..lowrank.row_blocks import wide
from ..quantization.dead_zone import BLOCK

#: Stored forms by the name that files know them by; ``kinds`` imports all of them.
KINDS: dict[str, type["Delta"]] = {}
#: Rows of a matrix, and their values.
Blocks = Iterator[tuple[slice | Tensor, Tensor]]


def last_of(
    delta: "Delta | None", shared: "Delta | None"
) -> tuple["Delta | None", "Delta | None"]:
    """What tells a task's whole change of a tensor, and what that stands on: what is shared, where a task has nothing of its own."""
    return (shared, None) if delta is None else (delta, shared)


def row_blocks(m: int, n: int) -> Iterator[slice]:
    """Rows of an (m, n) matrix, as many as are decoded at a time; eight of them take whole bytes whatever their bits."""
    step = max(BLOCK // max(n, 1) // 8, 1) * 8
    return (slice(start, min(start + step, m)) for start in range(0, m, step))


class Delta(nn.Module):
    """Base of all stored forms; a subclass that has a ``kind`` is known to files by it.

    Args:
        shape: of the tensor that is changed.
        given: the tensors of :attr:`parts`, then the numbers of :attr:`numbers`, in order or by name.
    """

    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()
    #: parts that may be None
    optional: ClassVar[tuple[str, ...]] = ()
    #: parts that are of the tensor's shape, and are given it
    shaped: ClassVar[tuple[str, ...]] = ()
    #: whole numbers that files know beside the tensors, by the attribute that holds each
    numbers: ClassVar[Mapping[str, str]] = MappingProxyType({})
    _given: ClassVar[Signature]
    __signature__: ClassVar[Signature]
    #: whether it changes anything by itself, rather than being what others are written in
    adds: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls
        names = ("shape", *cls.parts, *cls.numbers)
        cls._given = Signature(
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        own = cls.__init__ is not Delta.__init__
        cls.__signature__ = signature(cls.__init__.__get__(cls)) if own else cls._given

    def __init__(self, shape: tuple[int, ...], *given: Any, **named: Any):
        super().__init__()
        self.shape = tuple(shape)
        try:
            values = self._given.bind(shape, *given, **named).arguments
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        for name, attribute in self.numbers.items():
            setattr(self, attribute, values[name])
        for name in self.parts:
            if name in self.optional and values[name] is None:
                self.register_parameter(name, None)
                continue
            value = values[name].detach()
            if name in self.shaped:
                value = value.reshape(shape)
            value = value.contiguous()
            if value.untyped_storage().nbytes() > value.nbytes:
                # a view would keep, and be written with, the whole
                value = value.clone()
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Parts move with the model and keep their types: ``half()`` is of the backbone, and a scale of 1e-9 is 0 in float16."""
        return super()._apply(lambda part: keeping_type(part, fn), recurse)

    def own(self) -> Tensor:
        """The change in float32, of shape ``self.shape``, that it stands for by itself."""
        product = self.own_product()
        if product is None:
            raise NotImplementedError
        return product.dense().view(self.shape)

    def change(self, shared: "Delta | None" = None) -> Tensor:
        """The task's whole change in float32, of shape ``self.shape``, beside the shared part's delta of the same tensor."""
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

    def applied(self, base: Tensor, shared: "Delta | None" = None) -> Tensor:
        """The task's tensor, of a base value of the tensor's shape.

        In float32, in float64 where the base value is, but for what replaces the base value.
        """
        return wide(base) + self.change(shared)

    def beyond(self, shared: "Delta | None" = None) -> Tensor:
        """``change(shared) - shared.change()`` in float32; a form that adds to what is shared decodes only itself."""
        return self.own()

    def blocks(self, shared: "Delta | None" = None) -> Blocks:
        """:meth:`beyond` as a matrix, some rows at a time: which, and their values (k, n), not to be written to.

        Forms that are stored by rows, and products, decode no more than these at once; others all of them.
        """
        product = self.beyond_product(shared)
        if product is None:
            yield slice(0, self.sides[0]), self.beyond(shared).reshape(self.sides)
            return
        for rows in row_blocks(*self.sides):
            yield rows, product.up[rows] @ product.down

    def beyond_product(self, shared: "Delta | None" = None) -> LowRankFactors | None:
        """:meth:`beyond` as a product (m, r) (r, n) in float32; None where it is not stored as one."""
        return self.own_product()

    def scaled_product(
        self, shared: "Delta | None", dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """:meth:`beyond_product` as ``(up * scale) @ down``, factors in a type; no scale where that is in them."""
        product = self.beyond_product(shared)
        if product is None:
            return None
        return product.up.to(dtype), None, product.down.to(dtype)

    def decoded(self) -> "Delta":
        """This delta in float32, in memory: for a shared part that many tasks are worked out against."""
        return DecodedDelta(self.shape, self.change())

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that are written to the file, by part."""
        found = ((name, getattr(self, name)) for name in self.parts)
        return {name: value.detach() for name, value in found if value is not None}

    def options(self) -> dict[str, int]:
        """Constructor arguments beside shape and tensors, JSON-plain."""
        return {name: getattr(self, at) for name, at in self.numbers.items()}

    @property
    def bits(self) -> int:
        return sum(8 * tensor.nbytes for tensor in self.tensors().values())

    @property
    def sides(self) -> tuple[int, int]:
        """m and n of the tensor viewed as a matrix."""
        return (self.shape[0] if self.shape else 1), math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, bits={self.bits}"


def keeping_type(part: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor where a function puts it, which is shown bytes: casts are of floating types."""
    raw = part.reshape(-1).view(torch.uint8)
    found = fn(raw)
    if found.dtype != raw.dtype:  # nn.Module.type casts whole numbers too
        found = raw.to(found.device)
    return found.view(part.dtype).view(part.shape)


class DecodedDelta(Delta):
    """A change as it is, float32, in memory only."""

    parts = shaped = ("value",)

    def own(self) -> Tensor:
        return self.value
