"""Rounding of matrices and factors to few bits, one scale per row or direction.

``x ~ level * scale`` with the levels of ``codes.py``. In a product ``up @ down`` only the product of the two scales of a
direction counts, so a rank-r module stores r scales. Letters: ``m`` out, ``n`` in, ``r`` rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..lowrank.eigen import lifted_inverse
from ..lowrank.factors import LowRankFactors, Matrix, energy_of
from ..lowrank.row_blocks import Difference, differences
from .codes import ends, offset, pack_codes, packed_size

#: Mean squared rounding error of one Gaussian factor relative to its energy, by bits (optimal uniform step).
RELATIVE_ERROR = {2: 0.12, 3: 3.8e-2, 4: 1.2e-2, 8: 1.2e-4}
#: That step, in root mean squares; tried are multiples of it.
_STEP = {2: 0.996, 3: 0.586, 4: 0.335}
_MULTIPLES = (0.8, 0.9, 1.0, 1.12, 1.25, 1.4)
#: Entries of a row that are looked at for that, and what the mean over rows counts for the entries that are not.
_SAMPLE, _OTHERS = 192, 0.5
#: How often the two factors of a product are refitted to one another where rounding is all that is lost.
ROUNDS = 5


@dataclass(frozen=True)
class RoundedFactors:
    """``(up * scale) @ down`` in levels.

    Args:
        up: (m, r) int8 codes.
        down: (r, n) int8 codes.
        scale: (r,) float32.
        bits: of a code.
        error: squared error against the target.
        energy: squared norm of the target; rounding of sparse directions may lose more than that.
    """

    up: Tensor
    down: Tensor
    scale: Tensor
    bits: int
    error: float
    energy: float


def round_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (r, n) int8 and scales (r,); for few bits with the least squared error over a few scales.

    The scale is chosen on some entries of a row, and somewhat as other rows would.

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
    step = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    step.mul_(_STEP[bits] / max(x.shape[1], 1) ** 0.5)
    empty, step = step == 0, step.clamp_(min=smallest)
    some = x[:, :: -(-x.shape[1] // _SAMPLE)] / step
    unseen = 1 - some.shape[1] / max(x.shape[1], 1)
    step.mul_(_best_multiple(some, bits, empty, _OTHERS * unseen))
    return torch.div(x, step).floor_().clamp_(low, high), step


def _best_multiple(x: Tensor, bits: int, empty: Tensor, others: float) -> Tensor:
    """(r, 1) which multiple of the step leaves the least squared error in rows (r, n) in units of it.

    Args:
        empty: (r, 1) rows that have no say.
        others: what the mean over rows counts beside a row's own error.
    """
    (low, high), errors = ends(bits), []
    half, codes = x.new_tensor(-0.5), torch.empty_like(x)
    for multiple in _MULTIPLES:
        scaled = torch.add(half, x, alpha=1 / multiple)
        torch.round(scaled, out=codes).clamp_(low, high)
        rest = torch.linalg.vector_norm(scaled.sub_(codes), dim=1, keepdim=True)
        errors.append(rest.mul_(multiple).square_())
    lost = torch.cat(errors, 1).masked_fill_(empty, 0.0)  # (r, multiples)
    best = lost.add_(lost.mean(0), alpha=others).argmin(1)
    return torch.tensor(_MULTIPLES, dtype=x.dtype, device=x.device)[best][:, None]


def lost_by_row(x: Tensor, bits: int) -> Tensor:
    """(r,) squared norms, float64, of what :func:`round_rows` loses of (r, n)."""
    return _lost(*_coded(x, bits), x, bits).double().square()


def _lost(codes: Tensor, step: Tensor, x: Tensor, bits: int) -> Tensor:
    """(r,) norms of what codes of :func:`_coded`, which are overwritten, lose of (r, n)."""
    rest = codes.add_(offset(bits)).mul_(step).sub_(x)
    return torch.linalg.vector_norm(rest, dim=1)


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


def round_matrices(terms: Sequence[Difference], bits: int) -> list[RoundedMatrix]:
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
        lost[t, rows] = _lost(coded, step, x, bits)
    errors = lost.double().square().sum(1)
    made = zip(codes, scales, errors)
    return [RoundedMatrix(code, scale, bits, error) for code, scale, error in made]


def round_factors(
    factors: LowRankFactors, *, bits: int, target: Matrix | None = None
) -> RoundedFactors:
    """Round a low-rank module: each factor is refitted to the other as rounded, the last one to the target.

    The rounds before the last see the module only, where they cost ``O(r^2 (m + n))``; there are as many as the expected
    part of rounding in the error deserves, and the best is kept.

    Args:
        factors: the module, its directions orthogonal (as truncated SVDs are).
        target: (m, n) what the module should reproduce, never multiplied out; the product itself if None.
    """
    if factors.rank == 0:
        up, down = factors.up.to(torch.int8), factors.down.to(torch.int8)
        error = 0.0 if target is None else float(energy_of(target))
        return RoundedFactors(up, down, factors.up.new_zeros(0), bits, error, error)
    goal = factors if target is None else target
    if factors.shape[0] > factors.shape[1]:  # the long side last: its rounds cost most
        turned = round_factors(factors.mT, bits=bits, target=goal.mT)
        return replace(turned, up=turned.down.mT, down=turned.up.mT)
    energy = float(energy_of(goal))
    left = _best_side(factors, bits, energy)
    right, held = left.partner(left.values @ goal, bits)
    scale, error = left.step * right.step, max(energy - held, 0.0)
    return RoundedFactors(left.codes.mT, right.codes, scale, bits, error, energy)


@dataclass(frozen=True)
class _Side:
    """One rounded factor as rows.

    Args:
        codes: (r, n).
        step: (r,).
        values: (r, n) what they stand for.
        gram: (r, r) inner products of these.
    """

    codes: Tensor
    step: Tensor
    values: Tensor
    gram: Tensor

    @classmethod
    def of(cls, rows: Tensor, bits: int) -> "_Side":
        codes, step = round_rows(rows, bits)
        values = (codes + offset(bits)) * step[:, None]
        return cls(codes, step, values, values @ values.mT)

    def inverse(self) -> Tensor:
        """(r, r) of the Gram matrix: several times as fast as solving for so many columns."""
        return lifted_inverse(self.gram, 1e-6 * float(self.gram.diagonal().mean()))

    def partner(self, rows: Tensor, bits: int) -> tuple["_Side", float]:
        """The rounded factor that serves this one best, and by how much the pair lowers the squared error.

        Args:
            rows: (r, n) this side times the target.
        """
        other = _Side.of(self.inverse() @ rows, bits)
        held = 2 * (other.values * rows).sum() - (self.gram * other.gram).sum()
        return other, float(held)


def _best_side(factors: LowRankFactors, bits: int, energy: float) -> _Side:
    """The left factor rounded, after some rounds within the product of both.

    Args:
        energy: of what the product should reproduce, at least that of the product.
    """
    up, down = factors.up.mT, factors.down  # (r, m), (r, n)
    left = best = _Side.of(up, bits)
    own = float(((up @ up.mT) * (down @ down.mT)).sum())
    lost = 2 * RELATIVE_ERROR[bits] * own
    rounds = round(ROUNDS * lost / max(lost + energy - own, lost, 1e-300))
    most = -torch.inf
    for _ in range(rounds):
        right = _Side.of(left.inverse() @ (left.values @ up.mT) @ down, bits)
        left, held = right.partner(right.values @ down.mT @ up, bits)
        if held > most:
            best, most = left, held
    return best
