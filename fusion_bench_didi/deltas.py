"""How one task's change of one tensor is stored, and how it is applied.

A delta holds exactly the tensors that are written to the file, so that its cost in bits is the size of those tensors
and nothing has to be believed. ``change(shared)`` gives the change of the weight, where ``shared`` is what the shared
part contributes to this tensor (None where there is none).
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

    def __init__(self, shape: tuple[int, ...], **tensors: Tensor):
        super().__init__()
        self.shape = tuple(shape)
        for name in self.parts:
            value = tensors[name].detach().contiguous()
            if value.untyped_storage().nbytes() > value.nbytes:
                value = value.clone()  # a view would keep, and be written with, the whole
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def change(self, shared: Tensor | None = None) -> Tensor:
        """The task's change in float32, of shape ``self.shape``."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What is written to the file, by part."""
        return {name: getattr(self, name).detach() for name in self.parts}

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

    def change(self, shared: Tensor | None = None) -> Tensor:
        value = self.value.float()
        return value if shared is None else shared + value


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

    def change(self, shared: Tensor | None = None) -> Tensor:
        product = (self.up.float() @ self.down.float()).view(self.shape)
        return product if shared is None else shared + product


KINDS: dict[str, type[Delta]] = {cls.kind: cls for cls in (DenseDelta, LowRankDelta)}
