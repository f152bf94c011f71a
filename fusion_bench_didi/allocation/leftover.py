"""What the choice and the ranks leave of the budget: finer quantizers, and steps up the curves of the other forms."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .curves import PlacedCurve
from .spectra import MatrixSpectra, Rate, total_cost
from .water_filling import fill


def refine_precision(
    table: Sequence[MatrixSpectra],
    ranks: Sequence[Tensor],
    ladders: Sequence[Sequence[tuple[Rate, float]]],
    budget: int,
) -> tuple[list[MatrixSpectra], list[Tensor]]:
    """Spend what the ranks could not: finer precision, matrix by matrix, where it gains most per bit.

    Ranks run out where the budget is generous: every module of the chosen precisions is then complete.

    Args:
        ladders: per matrix the precisions, cheapest first, as (rate, relative rounding error); no two of one rate.

    Returns:
        the rows at their new rates, and the ranks, filled again.
    """
    rows, ranks = list(table), fill(table, ranks, budget)
    left = budget - total_cost(rows, ranks)
    finer = [_finer(*one) for one in zip(rows, ranks, ladders)]
    while True:
        fitting = [i for i, step in enumerate(finer) if step and step.bits <= left]
        i = max(fitting, key=lambda i: finer[i].gain, default=-1)
        if i < 0 or finer[i].gain <= 0:
            return rows, ranks
        left += rows[i].cost(ranks[i])
        rows[i] = finer[i].row
        # no step of another row fits, for what is left never grows
        (ranks[i],) = fill([rows[i]], [ranks[i]], left)
        left -= rows[i].cost(ranks[i])
        finer[i] = _finer(rows[i], ranks[i], ladders[i])


class _Finer(NamedTuple):
    """A row in its next precision, how many bits that takes more, and what it gains per bit."""

    row: MatrixSpectra
    bits: int
    gain: float


def _finer(
    row: MatrixSpectra, ranks: Tensor, ladder: Sequence[tuple[Rate, float]]
) -> _Finer | None:
    """None where there is no other precision or it costs nothing."""
    level = [rate for rate, _ in ladder].index(row.rate)
    if level + 1 == len(ladder):
        return None
    finer = replace(row, rate=ladder[level + 1][0])
    bits = finer.cost(ranks) - row.cost(ranks)
    if bits <= 0:
        return None
    energy = row.sigma.double().square().sum(1) + row.tail_energy
    # experts take what rounding of the shared module loses, where there are some
    rounded = torch.where(ranks > 0, energy, row.shared_energy)
    kept = float((row.module_weights * rounded)[1:].sum())
    gain = (ladder[level][1] - ladder[level + 1][1]) * kept / bits
    return _Finer(finer, bits, gain)


def climb(
    curves: Mapping[str, PlacedCurve], points: Mapping[str, Any], left: int
) -> dict[str, Any]:
    """Operating points after what is left, in bits, was spent one step at a time where it gains most per bit."""
    points = dict(points)
    steps = {name: _next_step(curves[name], points[name], left) for name in points}
    while True:
        # a step that still fits is the one that would be found again, for what is left never grows
        for name, step in steps.items():
            if step and step.bits > left:
                steps[name] = _next_step(curves[name], points[name], left)
        there = [name for name, step in steps.items() if step]
        if not there:
            return points
        name = max(there, key=lambda name: (steps[name].gain, name))
        points[name], left = steps[name].point, left - steps[name].bits
        steps[name] = _next_step(curves[name], points[name], left)


class _Step(NamedTuple):
    """A step up a curve: where it leads, how many bits that takes more, and what it gains per bit."""

    point: Any
    bits: int
    gain: float


def _next_step(curve: PlacedCurve, point: Any, left: int) -> _Step | None:
    """The next step up a curve; None where none fits."""
    found = curve.step(point, left)
    if found is None:
        return None
    gain, finer = found
    return _Step(finer, curve.rate(finer) - curve.rate(point), gain)
