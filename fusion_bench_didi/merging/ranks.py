"""The first pass over the matrices: decompose, decide how each is stored, allocate ranks."""

from torch import Tensor

from ..allocation.learned import learn_ranks
from ..allocation.leftover import refine_precision
from ..allocation.spectra import MatrixSpectra
from ..allocation.water_filling import greedy, uniform
from .context import Work
from .forms.choice import FirstPass, joint_pass


def first_pass(work: Work) -> FirstPass:
    """Table rows and the precision per matrix; bases go to the store."""
    if work.settings.joint:
        return joint_pass(work)
    fixed = 0 if work.settings.static == "none" else None
    stored_as = {n: work.inventory.precisions[n][0] for n in work.inventory.matrices}
    reach = {name: work.first_guess(name) for name in work.inventory.matrices}
    table = work.rows("decompose", reach, stored_as, dict.fromkeys(reach, fixed))
    return FirstPass(table, stored_as, {})


def allocate(work: Work, table: list[MatrixSpectra]) -> list[Tensor]:
    """Ranks (T + 1,) per matrix.

    Where every shared rank is fixed no cross terms are left, greedy is the optimum and there is nothing to learn.
    """
    settings, budget = work.settings, work.budget
    if not table:
        return []
    if settings.allocation == "uniform":
        return uniform(table, budget)
    settled = all(row.shared_rank is not None for row in table)
    if settings.allocation == "greedy" or (settled and settings.warm_start):
        return greedy(table, budget)
    start = (greedy if settings.warm_start else uniform)(table, budget)
    return learn_ranks(
        table,
        budget,
        start=start,
        settings=settings.learning,
        unit=work.inventory.unit_bits,
    )


def refined(work: Work, table: list[MatrixSpectra], ranks: list[Tensor]):
    """Rows, ranks and precisions after what is left was spent on finer precision."""
    options = [work.inventory.precisions[row.name] for row in table]
    ladders = [
        [(p.rate(*row.shape), p.rounding) for p in allowed]
        for row, allowed in zip(table, options)
    ]
    if not table:
        return table, ranks, {}
    table, ranks = refine_precision(table, ranks, ladders, work.budget)
    stored_as = {
        row.name: next(p for p in allowed if p.rate(*row.shape) == row.rate)
        for row, allowed in zip(table, options)
    }
    return table, ranks, stored_as
