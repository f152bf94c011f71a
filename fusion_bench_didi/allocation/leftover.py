"""What the choice and the ranks leave of the budget: finer quantizers, and steps up the curves of the other forms."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

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
        ladders: per matrix the precisions, cheapest first, as (rate, relative rounding error).

    Returns:
        the rows at their new rates, and the ranks, filled again.
    """
    rows, ranks = list(table), fill(table, ranks, budget)
    if not rows:
        return rows, ranks
    while True:
        left = budget - total_cost(rows, ranks)
        best = (0.0, -1, rows[0].rate)
        for i, (row, k, ladder) in enumerate(zip(rows, ranks, ladders)):
            rates = [rate for rate, _ in ladder]
            level = rates.index(row.rate)
            if level + 1 == len(ladder):
                continue
            finer = replace(row, rate=rates[level + 1])
            extra = finer.cost(k) - row.cost(k)
            if not 0 < extra <= left:
                continue
            energy = row.sigma.double().square().sum(1) + row.tail_energy
            kept = float((row.module_weights * energy * (k > 0))[1:].sum())
            gain = (ladder[level][1] - ladder[level + 1][1]) * kept / extra
            best = max(best, (gain, i, finer.rate), key=lambda entry: entry[0])
        gain, i, rate = best
        if gain <= 0:
            return rows, ranks
        rows[i] = replace(rows[i], rate=rate)
        ranks = fill(rows, ranks, budget)


def climb(
    curves: Mapping[str, PlacedCurve], points: Mapping[str, Any], left: int
) -> dict[str, Any]:
    """Operating points after what is left, in bits, was spent one step at a time where it gains most per bit."""
    points = dict(points)
    while True:
        steps = ((curves[n].step(p, left), n) for n, p in points.items())
        gain, point, name = max(
            ((*step, name) for step, name in steps if step), default=(0.0, None, "")
        )
        if point is None:
            return points
        left -= curves[name].rate(point) - curves[name].rate(points[name])
        points[name] = point
