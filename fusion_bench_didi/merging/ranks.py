"""Ranks of all modules under the budget, once the forms are chosen; what is left buys finer quantizers."""

from collections.abc import Sequence

from torch import Tensor

from ..allocation.learned import learn_ranks
from ..allocation.leftover import refine_precision
from ..allocation.spectra import MatrixSpectra
from ..allocation.water_filling import greedy, uniform
from ..deltas.precision import Precision
from .context import MergeContext


def allocate(
    context: MergeContext, table: Sequence[MatrixSpectra], budget: int
) -> list[Tensor]:
    """Ranks (T + 1,) per matrix under a budget in bits."""
    settings = context.settings
    if settings.allocation == "uniform":
        return uniform(table, budget)
    if settings.allocation == "greedy":
        return greedy(table, budget)
    start = (greedy if settings.warm_start else uniform)(table, budget)
    return learn_ranks(
        table,
        budget,
        start=start,
        settings=settings.learning,
        unit=context.inventory.unit_bits,
    )


def refined(
    context: MergeContext,
    table: Sequence[MatrixSpectra],
    ranks: Sequence[Tensor],
    budget: int,
) -> tuple[list[Tensor], list[Precision]]:
    """Ranks and precisions after what they left of the budget was spent on finer precision."""
    # of several precisions of small tensors that take the same bits, the finest
    options = [
        {
            p.rate(*row.shape).limited(row.rate.most): p
            for p in context.inventory.precisions[row.name]
        }
        for row in table
    ]
    ladders = [[(r, p.rounding) for r, p in allowed.items()] for allowed in options]
    rows, ranks = refine_precision(table, ranks, ladders, budget)
    return ranks, [allowed[row.rate] for row, allowed in zip(rows, options)]
