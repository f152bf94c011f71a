"""Matrices as entropy-coded numbers within a number of bits: all entries, or leading directions with both sides fitted.

Letters: ``m`` out, ``n`` in, ``r`` rank, ``s`` short side, ``l`` long side.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.eigen import lifted_inverse
from ..lowrank.factors import Matrix, energy_of
from .dead_zone import (
    CLASS_BITS,
    Codes,
    Quantizer,
    finest_step,
    quantize,
    rate_distortion,
)

#: Part of the bits that may stay unused, how often the step is moved to come closer, and how close it comes by halving where
#: that finds none.
SLACK, TRIES, CLOSE = 0.003, 4, 1.005
#: Bits that a value is taken to need less at a step of twice the size: one, and along a trellis, where a try takes long, what it is
#: at 1.5 bits, where some values are near zero.
SLOPE: dict[Quantizer, float] = {"scalar": 1.0, "trellis": 0.8}
#: How often the two sides of a product are fitted to one another, how far apart their steps may come to be, and what is added
#: to squared lengths, so that directions may be alike.
ROUNDS, APART, RIDGE = 2, 1.25, 1e-6


@dataclass(frozen=True)
class CodedMatrix:
    """Codes of a matrix.

    Args:
        sides: (m rows of n,), or (r rows of s, r rows of l).
        step: in the unit of the entries.
        error: squared.
    """

    sides: tuple[Codes, ...]
    step: float
    error: float

    @property
    def bits(self) -> float:
        return sum(codes.bits for codes in self.sides)


def code_rows(
    matrix: Tensor,
    step: float,
    bits: float,
    *,
    restored: bool = False,
    quantizer: Quantizer = "scalar",
) -> CodedMatrix:
    """All entries of a matrix (m, n) in float32.

    Args:
        step: near which the codes take ``bits``.
        restored: what they stand for is made longer by what rounding takes of the signal.
    """
    near = _step_for(matrix, step, bits, quantizer)
    codes, step = _within(matrix, near, bits, quantizer)
    if restored:
        codes = codes.restored(codes.held(matrix, step))
    return CodedMatrix((codes,), step, codes.squared_error(matrix, step))


def code_product(
    target: Matrix,
    vectors: Tensor,
    values: Tensor,
    step: float,
    bits: float,
    *,
    restored: bool = False,
    rounds: int = ROUNDS,
    quantizer: Quantizer = "scalar",
) -> CodedMatrix:
    """Leading directions of a matrix: one side rounded at unit length, the other fitted to it and rounded, in turns.

    Both are rounded in the same steps; those of the long side are moved at last until the bits are spent.

    Args:
        target: (m, n) what they should reproduce, never multiplied out.
        vectors: (s, r) leading singular vectors of the short side.
        values: (r,) singular values.
        step: near which the codes take ``bits``.
        restored: what they stand for is made longer by what rounding takes of the signal.
    """
    goal = target.mT if target.shape[0] >= target.shape[1] else target  # (s, l)
    for tries in itertools.count(1):
        rows = (vectors * values).mT  # (r, s)
        for left in reversed(range(rounds)):
            short, unit, kept = _directions(rows, step, quantizer)
            seen = unit @ goal  # (r, l)
            long = lifted_inverse(unit @ unit.mT, RIDGE) @ seen
            if left:
                codes, unit, _ = _directions(long, step, quantizer)
                gram = unit @ unit.mT
                rows = lifted_inverse(gram, RIDGE) @ (unit @ goal.mT)
                if tries == 1:  # later it would be moved back and forth
                    over = short.bits + codes.bits - bits
                    step = _moved(step, over, rows.numel() + long.numel())
        least = len(short) * (CLASS_BITS + goal.shape[1] / 1024)
        if bits - short.bits < max(bits / 8, least):
            step *= 2  # the short side alone takes nearly all
            continue
        codes, found = _within(long, step, bits - short.bits, quantizer)
        if tries >= TRIES or 1 / APART < found / step < APART:
            break
        part = goal.shape[1] / sum(goal.shape)
        step *= (found / step) ** part  # what both sides would take the bits at
    long, seen, unit_energy = long / found, seen / found, found**2  # in steps
    inside = float((long * (seen + RIDGE * long)).sum(dtype=torch.float64))
    outside = max(float(energy_of(target)) - inside * unit_energy, 0.0)
    if restored:
        short, codes = short.restored(kept), codes.restored(codes.held(long, 1.0))
    rounded = codes.values().mul_(short.gains[:, None]).sub_(long)
    error = float(((unit @ unit.mT) * (rounded @ rounded.mT)).sum())
    error = outside + max(error, 0.0) * unit_energy
    return CodedMatrix((short, codes), found, error)


def step_within(spread: Tensor, lengths: Tensor, bits: float) -> float:
    """The step at which Gaussian rows take so many bits.

    Args:
        spread: (r,) standard deviations.
        lengths: (r,) values of each row.
    """
    spread, lengths = spread.double().cpu(), lengths.double().cpu()
    finest, coarsest = (float(spread.max()) * 2.0**p for p in (-16, 8))
    for _ in range(40):
        step = (finest * coarsest) ** 0.5
        taken = (rate_distortion(spread / step)[0] * lengths).sum()
        if taken + CLASS_BITS * len(spread) > bits:
            finest = step
        else:
            coarsest = step
    return coarsest


def unit_rows(values: Tensor) -> Tensor:
    """(r, n) float32 directions of rows, in their place; zero where all are zero."""
    length = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values.div_(length.clamp(min=torch.finfo(values.dtype).tiny))


def _within(
    rows: Tensor, step: float, bits: float, quantizer: Quantizer
) -> tuple[Codes, float]:
    """Codes of rows (r, n) that take so many bits or somewhat less, and their step.

    Values of one size are above the step together: where that takes too many bits, and the next step holds nothing, some rows
    are coded and the others are not.

    Args:
        step: to start from.
    """
    codes, step = _at_one_step(rows, step, bits, quantizer)
    if bool(codes.any().any()) or not bool(rows.any()):
        return codes, step
    while not bool(codes.any().any()):
        step /= 2
        codes = quantize(rows, step, quantizer)
    return codes.best_rows(rows, step, bits), step


def _at_one_step(
    rows: Tensor, step: float, bits: float, quantizer: Quantizer
) -> tuple[Codes, float]:
    """:func:`_within` with all rows coded."""
    best, least = None, 0.0  # what fits, and a step that takes too many
    finest = finest_step(rows)
    slope, overs = SLOPE[quantizer] * rows.numel(), {}
    for tries in itertools.count(1):
        step = max(step, finest)
        codes = quantize(rows, step, quantizer)
        over = overs[step] = codes.bits - bits
        if over <= 0 and (best is None or step < best[1]):
            best = codes, step
        elif over > 0:
            least = max(least, step)
        if -SLACK * bits <= over <= 0 or (over <= 0 and step == finest):
            return codes, step
        if best is None and not bool(codes.any().any()):
            return codes, step  # there is no less
        if tries < TRIES:
            aim = SLACK / 2 * tries * bits  # farther below from time to time
            if quantizer == "trellis" and best is not None and least:
                high, low = (overs[end] + aim for end in (least, best[1]))
                step = least * (best[1] / least) ** (high / (high - low))
            else:
                step = _moved(step, over + aim, slope)
        elif best is None:  # few large values take most, whatever the others do
            step = 2 * least
        elif tries == TRIES or best[1] < CLOSE * least:
            return best
        else:
            step = (least * best[1]) ** 0.5


def _moved(step: float, bits: float, slope: float) -> float:
    """A step at which values take so many bits less; four times it at most.

    Args:
        slope: what they take less at a step of twice the size, one bit each where none is near zero.
    """
    return step * 2 ** min(max(bits / max(slope, 1), -2.0), 2.0)


def _step_for(rows: Tensor, step: float, bits: float, quantizer: Quantizer) -> float:
    """The step at which Gaussian rows (m, n) take so many bits.

    Args:
        step: near it.
    """
    spread = rows.square().mean(1).sqrt().double().cpu()
    steps = step * 2 ** torch.linspace(-2, 2, 33, dtype=torch.float64)
    taken = rate_distortion(spread / steps[:, None], quantizer)[0].sum(1)
    taken *= rows.shape[1]
    taken += CLASS_BITS * len(rows)  # the longer the step, the less
    i = min(max(int((taken > bits).sum()), 1), len(steps) - 1)
    above, below = taken[i - 1 : i + 1].tolist()
    part = min(max((above - bits) / max(above - below, 1.0), 0.0), 1.0)
    return float(steps[i - 1] * (steps[i] / steps[i - 1]) ** part)


def _directions(
    rows: Tensor, step: float, quantizer: Quantizer
) -> tuple[Codes, Tensor, Tensor]:
    """Codes of rows (r, n) but of those that stand for zero, what they stand for at unit length, and the part (r,) of the energy
    of each row that lies along that."""
    codes = quantize(rows, max(step, finest_step(rows)), quantizer)
    there = codes.any().nonzero().squeeze(1)
    codes = codes[there]
    unit, target = unit_rows(codes.values()), rows[there]
    lengths = torch.linalg.vector_norm(target, dim=1)
    tiny = torch.finfo(lengths.dtype).tiny
    along = torch.linalg.vecdot(unit, target) / lengths.clamp(min=tiny)
    return codes, unit, along.square()
