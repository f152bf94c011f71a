"""In what type modules and vectors are stored, and what that costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..allocation.spectra import Rate
from ..lowrank.factors import LowRankFactors, Matrix
from ..lowrank.row_blocks import Difference, cast
from ..quantization.codes import WIDTHS
from ..quantization.rounding import RELATIVE_ERROR, round_factors, round_matrices
from .base import Delta
from .plain import DenseDelta, LowRankDelta
from .quantized import RoundedDenseDelta, RoundedLowRankDelta
from .storage import dtype_bits
from .tucker import Bases, BasesDelta, CoreDelta, RoundedBasesDelta, RoundedCoreDelta

#: Bits of a rounding scale.
SCALE_BITS = 32

_FLOATS = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_CODES = {f"int{bits}": bits for bits in WIDTHS}
#: In what numbers are stored: ``auto`` chooses per matrix, with its rank, among the integer types and ``checkpoint``, the type that
#: the checkpoints have it in; any other is taken for all of them. Fewer bits leave room for more rank.
FactorType = Literal[
    "checkpoint",
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "int4",
    "int3",
    "int2",
    "auto",
]


@dataclass(frozen=True)
class Precision:
    """One way to write numbers down.

    Args:
        name: a floating type, or ``int2`` to ``int8``.
        bits: per value.
        dtype: of floating storage; None for integer codes.
        cast: expected squared error of the type relative to the energy, where another would lose less.
    """

    name: str
    bits: int
    dtype: torch.dtype | None = None
    cast: float = 0.0

    @property
    def scale_bits(self) -> int:
        """Bits beside those of the numbers: of the scale of each direction, or row, of integer codes."""
        return SCALE_BITS if self.dtype is None else 0

    @property
    def rounding(self) -> float:
        """Expected squared error of a stored product relative to its energy.

        The factors are refitted to one another as rounded, which leaves little more than one rounding.
        """
        return RELATIVE_ERROR[self.bits] * 1.5 if self.dtype is None else self.cast

    @property
    def rounding_dense(self) -> float:
        """Expected squared error of a matrix stored whole, relative to its energy."""
        return RELATIVE_ERROR[self.bits] if self.dtype is None else self.cast

    def whole(self, numel: Tensor | int) -> Tensor | int:
        """Bits of so many numbers, in whole bytes."""
        return -(-self.bits * numel // 8) * 8

    def rate(self, m: int, n: int) -> Rate:
        """At most what is stored."""
        return Rate(
            per_rank=self.whole(m) + self.whole(n) + self.scale_bits,
            dense=self.core_bits(m, n),
        )

    def common_bits(
        self, shape: tuple[int, int], tasks: int, p: Tensor, q: Tensor
    ) -> Tensor:
        """Bits of common bases of p columns and q rows of an (m, n) matrix, at most, with the cores of all tasks.

        A whole side needs no basis.
        """
        (m, n), up, down = shape, p * (p < shape[0]), q * (q < shape[1])
        bases = (
            self.whole(m) * up + self.whole(n) * down + self.scale_bits * (up + down)
        )
        return bases + tasks * self.core_bits(p, q)

    def core_bits(self, p: Tensor | int, q: Tensor | int) -> Tensor | int:
        """Bits of one task's core (p, q) in common bases, or of a whole matrix of these sides."""
        return self.whole(p * q) + self.scale_bits * p

    def common_rounding(self, shape: tuple[int, int], p: Tensor, q: Tensor) -> Tensor:
        """Expected squared error of ``U C_t V``, each of them rounded, relative to its energy."""
        rounded = 1 + (p < shape[0]).double() + (q < shape[1]).double()
        return self.rounding_dense * rounded

    def bases(self, shape: tuple[int, ...], up: Tensor, down: Tensor) -> Bases:
        """Store common bases (m, p) and (q, n)."""
        if self.dtype is not None:
            return BasesDelta.of(shape, up.to(self.dtype), down.to(self.dtype))
        return RoundedBasesDelta.of(shape, up, down, self.bits)

    def core(self, shape: tuple[int, ...], core: Tensor) -> Delta:
        """Store a task's coordinates (p, q) in common bases."""
        if self.dtype is not None:
            return CoreDelta(shape, core.to(self.dtype))
        return RoundedCoreDelta.of(shape, core, self.bits)

    def low_rank(
        self, shape: tuple[int, ...], factors: LowRankFactors, target: Matrix | None
    ) -> tuple[Delta | None, float | None]:
        """Store a product; integer codes are fitted to ``target`` (m, n) if given, and their squared error is known.

        Nothing is stored of what rounding would lose more of than there is of the target.
        """
        if self.dtype is not None:
            return LowRankDelta.of(shape, factors, self.dtype), None
        rounded = round_factors(factors, bits=self.bits, target=target)
        if target is not None and rounded.error >= rounded.energy:
            return None, rounded.energy
        return RoundedLowRankDelta.of(shape, rounded), rounded.error

    def dense(
        self, shape: tuple[int, ...], terms: Sequence[Difference]
    ) -> tuple[list[Delta], Tensor]:
        """Store every entry of differences (m, n), on the CPU; with (T,) squared norms of what that loses."""
        if self.dtype is not None:
            values, errors = cast(terms, self.dtype)
            return [DenseDelta(shape, value) for value in values], errors
        made = round_matrices(terms, self.bits)
        errors = torch.stack([rounded.error for rounded in made])
        return [RoundedDenseDelta.of(shape, rounded) for rounded in made], errors


#: Between the codes and the own type of a vector.
BFLOAT16 = Precision("bfloat16", 16, torch.bfloat16, cast=2.0**-20)


def precisions(name: FactorType, own: torch.dtype) -> tuple[Precision, ...]:
    """The precisions that a setting allows for a tensor, cheapest first.

    Args:
        name: a :data:`FactorType`; ``checkpoint`` is the tensor's own type, ``auto`` leaves the choice to the allocation.
        own: type of the tensor in the checkpoints.
    """
    if name == "auto":
        codes = (Precision(code, bits) for code, bits in _CODES.items())
        return (*codes, *precisions("checkpoint", own))
    if name in _CODES:
        return (Precision(name, _CODES[name]),)
    dtype = own if name == "checkpoint" else _FLOATS[name]
    return (Precision(str(dtype).removeprefix("torch."), dtype_bits(dtype), dtype),)


def vector_precisions(own: torch.dtype) -> tuple[Precision, ...]:
    """The precisions in which a vector of a type in the checkpoints competes for bits, cheapest first."""
    *codes, as_is = precisions("auto", own)
    if as_is.bits > BFLOAT16.bits:
        codes.append(BFLOAT16)
    return (*codes, as_is)


#: Vectors that take more of the budget than this are narrowed by ``auto``.
_FEW = 0.02


def vector_dtype(name: FactorType, own: torch.dtype, *, share: float) -> torch.dtype:
    """In what type tensors are stored that do not compete for bits: whole ones, and vectors where precisions are not chosen.

    Args:
        share: of the budget that they take in their own type; ``auto`` goes to bfloat16 where that is above :data:`_FEW`.
    """
    if name in _FLOATS:
        return _FLOATS[name]
    if name == "checkpoint" or (name == "auto" and share <= _FEW):
        return own
    return torch.bfloat16
