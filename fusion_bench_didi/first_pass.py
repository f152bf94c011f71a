"""The first pass over the matrices: decompose, decide what to share and in how many bits, allocate ranks."""

import torch
from torch import Tensor

from .joint_pass import FirstPass, joint_pass
from .layout import Layout, MergeSettings
from .lowrank import MatrixSpectra, greedy, learn_ranks, uniform, upgrade
from .task_vectors import Scan
from .work import Work


def loss_weights(
    scan: Scan, layout: Layout, settings: MergeSettings
) -> dict[str, Tensor]:
    """(T,) weight of each task's squared error, per matrix.

    ``root`` weighs by 1 / ||tau||: plain MSE spends everything on the matrices of most energy, the relative error as
    much on those that hardly moved; the mean of the two (in the exponent) kept most accuracy where it was measured.
    """
    energies = {name: scan.energy[name] for name in layout.matrices}
    how = settings.normalisation
    if how == "none":
        return {name: torch.ones_like(e).float() for name, e in energies.items()}
    if how == "sensitivity":
        known = settings.sensitivity or {}
        if not known:
            raise ValueError("normalisation=sensitivity needs settings.sensitivity.")
        average = sum(known.values()) / len(known)
        return {
            name: torch.full_like(e, known.get(name, average) / average).float()
            for name, e in energies.items()
        }
    if how == "task":
        total = torch.stack(list(energies.values())).sum(0)
        energies = {name: total for name in energies}
    power = 0.5 if how == "root" else 1.0
    weights = {}
    for name, e in energies.items():
        # a task that leaves the matrix alone is disturbed by a shared change as much as the average task
        e = torch.where(e > 0, e, e[e > 0].mean())
        weights[name] = e.pow(-power).float()
    return weights


def first_pass(work: Work) -> FirstPass:
    """Table rows and the precision per matrix; bases go to the store."""
    if work.settings.joint:
        return joint_pass(work)
    fixed = 0 if work.settings.static == "none" else None
    stored_as = {n: work.layout.precisions[n][0] for n in work.layout.matrices}
    reach = {name: work.first_guess(name) for name in work.layout.matrices}
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
    settled = all(row.fixed_shared is not None for row in table)
    if settings.allocation == "greedy" or (settled and settings.warm_start):
        return greedy(table, budget)
    start = (greedy if settings.warm_start else uniform)(table, budget)
    return learn_ranks(
        table,
        budget,
        start=start,
        settings=settings.learning,
        unit=work.layout.unit_bits,
    )


def refined(work: Work, table: list[MatrixSpectra], ranks: list[Tensor]):
    """Rows, ranks and precisions after what is left was spent on finer precision."""
    options = [work.layout.precisions[row.name] for row in table]
    ladders = [
        [(p.price(*row.shape), p.rounding) for p in allowed]
        for row, allowed in zip(table, options)
    ]
    if not table:
        return table, ranks, {}
    table, ranks = upgrade(table, ranks, ladders, work.budget)
    stored_as = {
        row.name: next(p for p in allowed if p.price(*row.shape) == row.price)
        for row, allowed in zip(table, options)
    }
    return table, ranks, stored_as
