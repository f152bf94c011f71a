"""Deltas in common subspaces: shared bases U and V, and per task a core C_t, for a change ``U C_t V``.

The bases are the shared part of a tensor; by themselves they change nothing. A whole side needs no basis, the side's own
coordinates are used then. Letters: ``m`` out, ``n`` in, ``p`` and ``q`` sizes of a core.
"""

import torch
from torch import Tensor

from ..lowrank.factors import LowRankFactors
from ..quantization.codes import levels, pack_codes
from ..quantization.rounding import round_rows
from .base import Delta


class Bases(Delta):
    """Base of the shared forms."""

    adds = False

    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        """U (m, p) and V (q, n) in float32; None for a whole side."""
        raise NotImplementedError

    def own_product(self) -> LowRankFactors:
        like = next(self.parameters()).new_empty(0, dtype=torch.float32)
        return LowRankFactors.zeros(*self.sides, like=like)

    def decoded(self) -> Delta:
        return BasesDelta(self.shape, *self.bases())

    def factors(self, core: Tensor) -> tuple[Tensor, Tensor] | None:
        """Two factors (m, r) and (r, n) of ``U core V``, r the smaller of p and q; None for whole sides."""
        up, down = self.bases()
        if down is None or (up is not None and core.shape[0] <= core.shape[1]):
            return None if up is None else (up, core if down is None else core @ down)
        return core if up is None else up @ core, down

    def spread(self, core: Tensor) -> Tensor:
        """``U core V`` of the tensor's shape."""
        factors = self.factors(core)
        dense = core if factors is None else factors[0] @ factors[1]
        return dense.view(self.shape)


class BasesDelta(Bases):
    """Bases in a floating type.

    Args:
        up: (m, p), None for a whole side.
        down: (q, n), or None.
    """

    kind = "bases"
    parts = optional = ("up", "down")

    @classmethod
    def of(cls, shape: tuple[int, ...], up: Tensor, down: Tensor) -> "BasesDelta":
        """From square ones for whole sides."""
        return cls(shape, *_without_whole(up, down))

    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        up, down = (b if b is None else b.float() for b in (self.up, self.down))
        return up, down


class RoundedBasesDelta(Bases):
    """Bases as integer codes with one float32 scale per column of U and row of V.

    Args:
        up, down: codes of U's transpose (p, m) and of V (q, n), stored as ``quantization/codes.py`` says.
        up_scale, down_scale: (p,) and (q,).
        bits: of a code.

    All of a whole side are None.
    """

    kind = "rounded_bases"
    parts = optional = ("up", "up_scale", "down", "down_scale")
    numbers = {"bits": "width"}

    @classmethod
    def of(
        cls, shape: tuple[int, ...], up: Tensor, down: Tensor, bits: int
    ) -> "RoundedBasesDelta":
        """From square ones for whole sides."""
        parts: list[Tensor | None] = []
        for rows in _without_whole(up.mT, down):
            if rows is None:
                parts += [None, None]
                continue
            codes, scale = round_rows(rows, bits)
            parts += [pack_codes(codes, bits), scale]
        return cls(shape, *parts, bits)

    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        m, n = self.sides
        up = self._rows(self.up, self.up_scale, m)
        return None if up is None else up.mT, self._rows(self.down, self.down_scale, n)

    def _rows(
        self, codes: Tensor | None, scale: Tensor | None, width: int
    ) -> Tensor | None:
        if codes is None:
            return None
        return levels(codes, self.width, (len(scale), width)) * scale[:, None]


class Core(Delta):
    """Base of a task's coordinates in the common bases."""

    def core(self) -> Tensor:
        """C_t (p, q) in float32."""
        raise NotImplementedError

    def change(self, shared: Delta | None = None) -> Tensor:
        if not isinstance(shared, Bases):
            raise ValueError("A core needs the common bases that it is written in.")
        return shared.spread(self.core())

    def beyond(self, shared: Delta | None = None) -> Tensor:
        return self.change(shared)  # bases change nothing by themselves

    def beyond_product(self, shared: Delta | None = None) -> LowRankFactors | None:
        return self.product(shared)

    def product(self, shared: Delta | None = None) -> LowRankFactors | None:
        factors = shared.factors(self.core())
        return None if factors is None else LowRankFactors(*factors)


class CoreDelta(Core):
    """A task's core (p, q) in common bases, in a floating type."""

    kind = "core"
    parts = ("value",)

    def core(self) -> Tensor:
        return self.value.float()


class RoundedCoreDelta(Core):
    """Integer codes with one float32 scale per row.

    Args:
        codes: (p, q), stored as ``quantization/codes.py`` says.
        scale: (p,).
        bits: of a code.
        columns: q.
    """

    kind = "rounded_core"
    parts = ("codes", "scale")
    numbers = {"bits": "width", "columns": "columns"}

    @classmethod
    def of(cls, shape: tuple[int, ...], core: Tensor, bits: int) -> "RoundedCoreDelta":
        codes, scale = round_rows(core, bits)
        return cls(shape, pack_codes(codes, bits), scale, bits, core.shape[1])

    def core(self) -> Tensor:
        shape = len(self.scale), self.columns
        return levels(self.codes, self.width, shape) * self.scale[:, None]


def _without_whole(*bases: Tensor) -> list[Tensor | None]:
    """None for the square ones."""
    return [None if b.shape[0] == b.shape[1] else b for b in bases]
