"""Rounding of matrices and factors to few bits, one scale per row or direction.

``x ~ level * scale`` with the levels of ``codes.py``. In a product ``up @ down`` only the product of the two scales of a
direction counts, so a rank-r module stores r scales. Letters: ``m`` out, ``n`` in, ``r`` rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Terms, differences
from .codes import ends, offset, pack_codes, packed_size
from .factors import LowRankFactors, Matrix, energy_of

#: Mean squared rounding error of one Gaussian factor relative to its energy, by bits (optimal uniform step).
RELATIVE_ERROR = {2: 0.12, 3: 3.8e-2, 4: 1.2e-2, 8: 1.2e-4}
#: That step, in root mean squares; tried are multiples of it.
_STEP = {2: 0.996, 3: 0.586, 4: 0.335}
_MULTIPLES = (0.8, 0.9, 1.0, 1.12, 1.25, 1.4)
#: Entries of a row that are looked at for that.
_SAMPLE = 256
#: How often at most the two factors of a product are refitted to one another, while that lowers the error by such a part.
ROUNDS, GAIN = 3, 0.015


@dataclass(frozen=True)
class RoundedFactors:
    """``(up * scale) @ down`` in levels.

    Args:
        up: (m, r) int8 codes.
        down: (r, n) int8 codes.
        scale: (r,) float32.
        bits: of a code.
    """

    up: Tensor
    down: Tensor
    scale: Tensor
    bits: int

    def dense(self) -> Tensor:
        half = offset(self.bits)
        up, down = self.up.float() + half, self.down.float() + half
        return (up * self.scale) @ down  # (m, n)


def round_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (r, n) int8 and scales (r,); for few bits with the least squared error over a few scales.

    The scale is chosen on at most :data:`_SAMPLE` entries of a row.

    Args:
        x: (r, n).
    """
    coded, step = _coded(x, bits)
    return coded.to(torch.int8), step[:, 0]


def _coded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """:func:`round_rows` with the codes (r, n) and steps (r, 1) still in the type of ``x``."""
    low, high = ends(bits)
    smallest = torch.finfo(x.dtype).tiny
    if bits == 8:
        largest = x.abs().amax(1, keepdim=True)  # many times as fast as the norm
        step = largest.clamp_(min=smallest).div_(high)
        return torch.div(x, step).round_().clamp_(low, high), step
    some = x[:, :: -(-x.shape[1] // _SAMPLE)].contiguous()
    size = torch.linalg.vector_norm(some, dim=1, keepdim=True)
    step = size.mul_(_STEP[bits] / max(some.shape[1], 1) ** 0.5)
    if not bool((step > 0).all()):  # a row whose sample is all zero
        step = torch.where(step > 0, step, x.abs().amax(1, keepdim=True) / (high + 0.5))
    step = step.clamp_(min=smallest)
    step.mul_(_best_multiple(some / step, bits))
    return torch.div(x, step).floor_().clamp_(low, high), step


def _best_multiple(x: Tensor, bits: int) -> Tensor:
    """(r, 1) which multiple of the step leaves the least squared error in rows (r, n) in units of it."""
    (low, high), errors = ends(bits), []
    scaled, codes = torch.empty_like(x), torch.empty_like(x)
    for multiple in _MULTIPLES:
        torch.mul(x, 1 / multiple, out=scaled)
        torch.floor(scaled, out=codes).clamp_(low, high)
        rest = scaled.sub_(codes).sub_(0.5)
        errors.append(torch.linalg.vector_norm(rest, dim=1).mul_(multiple))
    best = torch.stack(errors).argmin(0)
    return torch.tensor(_MULTIPLES, dtype=x.dtype, device=x.device)[best][:, None]


@dataclass(frozen=True)
class RoundedMatrix:
    """``level * scale``, row by row.

    Args:
        codes: as stored, see ``codes.py``.
        scale: (m,) float32.
        bits: of a code.
        error: squared norm of what rounding lost, float64.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    error: Tensor


def round_matrices(terms: Sequence[Terms], bits: int) -> list[RoundedMatrix]:
    """:func:`round_rows` of differences, packed, and what each lost.

    Blocks of rows go through all of it while they are in the cache: every entry is read from memory once, and neither
    the differences nor what the codes stand for are ever held whole.
    """
    (m, n), device = terms[0][0].shape, terms[0][0].device
    shape, dtype = (m, n), torch.int8
    if bits < 8:
        shape, dtype = (packed_size(m * n, bits),), torch.uint8
    codes = [torch.empty(shape, dtype=dtype, device=device) for _ in terms]
    scales = torch.empty(len(terms), m, device=device)
    lost = torch.empty_like(scales)  # norms of rows
    for t, rows, x in differences(terms):
        coded, step = _coded(x, bits)
        place = rows
        if bits < 8:
            begin, end = (packed_size(row * n, bits) for row in (rows.start, rows.stop))
            place = slice(begin, end)
        codes[t][place] = pack_codes(coded.to(torch.int8), bits)
        scales[t, rows] = step[:, 0]
        rest = coded.add_(offset(bits)).mul_(step).sub_(x)
        lost[t, rows] = torch.linalg.vector_norm(rest, dim=1)
    errors = lost.double().square().sum(1)
    made = zip(codes, scales, errors)
    return [RoundedMatrix(code, scale, bits, error) for code, scale, error in made]


def round_factors(
    factors: LowRankFactors, *, bits: int, target: Matrix | None = None
) -> RoundedFactors:
    """Round a low-rank module; each factor in turn is refitted to the other as rounded, and the best pair is kept.

    Args:
        factors: the module, its directions orthogonal (as truncated SVDs are).
        target: (m, n) what the module should reproduce, never multiplied out; the product itself if None.
    """
    if factors.rank == 0:
        up, down = factors.up.to(torch.int8), factors.down.to(torch.int8)
        return RoundedFactors(up, down, factors.up.new_zeros(0), bits)
    target = factors if target is None else target
    left, best, found = _Side.of(factors.up.mT, bits), torch.inf, None
    rounds = ROUNDS if bits < 8 else 1
    energy = float(energy_of(target)) if rounds > 1 else 0.0
    for last in range(rounds, 0, -1):
        right, less = left.partner(target)
        before, error = best, energy + less
        if error < best:
            scale = left.step * right.step
            best, found = error, (left.codes.mT, right.codes, scale)
        if last == 1 or error > (1 - GAIN) * before:
            break
        left, _ = right.partner(target.mT)
    return RoundedFactors(*found, bits)


@dataclass(frozen=True)
class _Side:
    """One rounded factor as rows.

    Args:
        codes: (r, n).
        step: (r,).
        values: (r, n) what they stand for.
    """

    codes: Tensor
    step: Tensor
    values: Tensor
    bits: int

    @classmethod
    def of(cls, rows: Tensor, bits: int) -> "_Side":
        codes, step = round_rows(rows, bits)
        return cls(codes, step, (codes + offset(bits)) * step[:, None], bits)

    def partner(self, target: Matrix) -> tuple["_Side", float]:
        """The rounded factor that serves this one best, and the squared error of the pair less ``||target||^2``.

        Args:
            target: (m, n) with m the columns of this side.
        """
        gram, rows = self.values @ self.values.mT, self.values @ target  # (r, n)
        ridge = 1e-6 * gram.diagonal().mean()
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        # many times as fast as solving for so many columns
        inverse = torch.linalg.inv(gram.double().add_(eye, alpha=float(ridge)))
        other = _Side.of(inverse.to(rows.dtype) @ rows, self.bits)
        error = (gram @ other.values - 2 * rows).mul_(other.values).sum()
        return other, float(error)
