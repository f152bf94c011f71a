"""Choices per matrix that are made together with the ranks: what is shared, how, and in how many bits.

A candidate is one form of a matrix in one precision. *Experts* fix the shared module's rank k_0 and are residuals against the
*truncated* shared part, ``tau_t - S_k0``, so that the error is an exact sum of their lost singular values and no cross
terms remain; *common subspaces* (``common.py``) have two sizes instead of ranks. For a multiplier ``mu`` (error per bit) the
best ranks or sizes of every candidate are known in closed form; the best candidate per matrix follows, and ``mu`` is the
smallest that meets the budget. Experts with ``k_0 = 0`` are always among the candidates, so anything is only shared where it
pays. Letters: ``T`` tasks, ``q`` kept singular values.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

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
        ladders: per matrix the precisions, cheapest first, as (price, relative rounding error).

    Returns:
        the rows at their new prices, and the ranks, filled again.
    """
    rows, ranks = list(table), fill(table, ranks, budget)
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
