"""Matrices as entropy-coded numbers within a number of bits: all entries, or leading directions with both sides fitted.

Letters: ``m`` out, ``n`` in, ``r`` rank, ``s`` short side, ``l`` long side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.factors import Matrix, energy_of
from .dead_zone import CLASS_BITS, Codes, quantize, rate_distortion

#: Part of the bits that may stay unused, and how often the step is moved to come closer.
SLACK, TRIES = 0.003, 4
#: How often the two sides of a product are fitted to one another.
ROUNDS = 2


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
    matrix: Tensor, step: float, bits: float, *, gain: float = 1.0
) -> CodedMatrix:
    """All entries of a matrix (m, n) in float32.

    Args:
        step: near which the codes take ``bits``.
        gain: what they stand for is so many times as large.
    """
    m, n = matrix.shape
    spread = matrix.square().mean(1).sqrt().double().cpu()
    low, high = math.log(step / 4), math.log(4 * step)
    for _ in range(30):
        middle = (low + high) / 2
        taken = n * float(rate_distortion(spread / math.exp(middle))[0].sum())
        low, high = (low, middle) if taken + CLASS_BITS * m <= bits else (middle, high)

    def at(step: float) -> CodedMatrix:
        codes = quantize(matrix, step)
        error = codes.values().mul_(step * gain).sub_(matrix)
        error = torch.linalg.vector_norm(error, dim=1).double().square().sum()
        return CodedMatrix((codes,), step * gain, float(error))

    return _fitted(at, math.exp(high), bits, m * n)


def code_product(
    target: Matrix,
    vectors: Tensor,
    values: Tensor,
    step: float,
    bits: float,
    *,
    gain: float = 1.0,
    rounds: int = ROUNDS,
) -> CodedMatrix:
    """Leading directions of a matrix: one side rounded at unit length, the other fitted to it and rounded, in turns.

    Args:
        target: (m, n) what they should reproduce, never multiplied out.
        vectors: (s, r) leading singular vectors of the short side.
        values: (r,) singular values.
        step: near which the codes take ``bits``.
        gain: what they stand for is so many times as large.
    """
    goal = target.mT if target.shape[0] >= target.shape[1] else target  # (s, l)
    start, energy = (vectors * values).mT, float(energy_of(target))  # (r, s)

    def at(step: float) -> CodedMatrix:
        rows = start
        for left in reversed(range(rounds)):
            short, unit = _directions(quantize(rows, step))
            seen = unit @ goal
            long = quantize(_inverse(unit) @ seen, step)
            if left:
                _, unit = _directions(long)
                rows = _inverse(unit) @ (unit @ goal.mT)
        stood = long.values().mul_(step * gain)
        held = 2 * (stood * seen).sum() - ((unit @ unit.mT) * (stood @ stood.mT)).sum()
        return CodedMatrix((short, long), step * gain, max(energy - float(held), 0.0))

    return _fitted(at, step, bits, len(values) * sum(target.shape))


def unit_rows(values: Tensor) -> Tensor:
    """(r, n) float32 directions of rows, in their place; zero where all are zero."""
    length = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values.div_(length.clamp(min=torch.finfo(values.dtype).tiny))


def _fitted(
    at: Callable[[float], CodedMatrix], step: float, bits: float, numel: int
) -> CodedMatrix:
    """The codes of a step that take so many bits or somewhat less.

    Args:
        numel: values that are coded, each of which takes a bit less for a step of twice the size.
    """
    best, tries = None, 0
    while best is None or tries < TRIES:
        coded, tries = at(step), tries + 1
        over = coded.bits - bits
        if over <= 0 and (best is None or coded.error < best.error):
            best = coded
        if -SLACK * bits <= over <= 0:
            break
        aim = SLACK / 2 * tries * bits  # farther below from time to time
        step *= 2 ** ((over + aim) / numel)
    return best


def _directions(codes: Codes) -> tuple[Codes, Tensor]:
    """Codes without rows of zeros, and what they stand for at unit length."""
    codes = codes[codes.symbols.any(1)]
    return codes, unit_rows(codes.values())


def _inverse(unit: Tensor) -> Tensor:
    """(r, r) of the slightly lifted Gram matrix of rows (r, n) of unit length."""
    gram = (unit @ unit.mT).double()
    return torch.linalg.inv(
        gram + 1e-6 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    ).to(unit.dtype)
