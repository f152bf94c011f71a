"""The first pass over the matrices: decompose, decide what to share and in how many bits, allocate ranks."""

from dataclasses import replace

import torch
from torch import Tensor

from .layout import Layout, MergeSettings
from .lowrank import (
    Candidate,
    MatrixSpectra,
    choose,
    energy_of,
    greedy,
    leading,
    learn_ranks,
    sharing,
    singular_values,
    subtracting,
    uniform,
    upgrade,
    water_level,
)
from .precision import Precision
from .task_vectors import Scan
from .work import Work

#: Sharing is looked into where the leading shared directions hold this much more than unrelated tasks would give.
WORTH_SHARING = 1.5

Table = list[MatrixSpectra]
StoredAs = dict[str, Precision]


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


def first_pass(work: Work) -> tuple[Table, StoredAs]:
    """Table rows and the precision per matrix; bases go to the store."""
    if work.settings.joint:
        return _joint_pass(work)
    fixed = 0 if work.settings.shared == "none" else None
    stored_as = {n: work.layout.precisions[n][0] for n in work.layout.matrices}
    reach = {name: work.first_guess(name) for name in work.layout.matrices}
    table = work.rows("decompose", reach, stored_as, dict.fromkeys(reach, fixed))
    return table, stored_as


def _joint_pass(work: Work) -> tuple[Table, StoredAs]:
    """Choose shared rank and precision per matrix first (``lowrank.candidates``), then decompose against them."""
    names = work.layout.matrices
    cheapest = {n: work.layout.precisions[n][0] for n in names}
    alone = dict.fromkeys(names, 0)
    reach = {name: work.first_guess(name) for name in names}
    table = work.rows("decompose", reach, cheapest, alone)
    while longer := work.extended(table, greedy(table, work.budget), cheapest):
        table = longer
    own = {row.name: _candidate(work, row) for row in table}
    level = water_level(
        [c.sigma for c in own.values()],
        [work.weights[n] for n in names],
        [c.price for c in own.values()],
        work.budget,
    )
    sharable = work.settings.residual == "truncated" and level > 0
    options = [[own[n]] for n in names]
    if sharable and work.settings.shared != "none":
        shared = work.over(
            "share", lambda n: _shared_too(work, n, own[n], level), names
        )
        options = [[own[n], *more] for n, more in shared]
    options = [
        [
            replace(
                c,
                price=p.price(*work.shape(n)),
                precision=p.name,
                rounding=p.rounding,
                rounding_dense=p.rounding_dense,
            )
            for c in row
            for p in work.layout.precisions[n]
        ]
        for n, row in zip(names, options)
    ]
    picks = choose(options, [work.weights[n] for n in names], work.budget)
    chosen = {n: row[i] for n, row, i in zip(names, options, picks)}
    stored_as = {
        n: next(p for p in work.layout.precisions[n] if p.name == c.precision)
        for n, c in chosen.items()
    }
    mixed = {n: c.shared_rank for n, c in chosen.items() if c.shared_rank}
    reach = {n: chosen[n].sigma.shape[1] for n in mixed}
    with_shared = work.rows("share", reach, stored_as, mixed)
    rows = {row.name: row for row in (*table, *with_shared)}
    return [
        replace(rows[n], price=stored_as[n].price(*work.shape(n))) for n in names
    ], stored_as


def _shared_too(work: Work, name: str, own: Candidate, level: float) -> list[Candidate]:
    """What might pay beside experts only, in the same precision."""
    vectors, weights = work.read(name), work.weights[name]
    q = own.sigma.shape[1]
    shared = work.shared(name, vectors)
    found = leading(shared, max_rank=q, name=name)
    mean = found.S.cpu()
    gain = weights.sum() * mean.square() / own.price.per_rank
    # a shared component gains at most this much per bit; where it gains T levels, every expert would hold it too
    ranks = {int((gain >= level * times).sum()) for times in (1, len(weights))}
    candidates = []
    for k in sorted(ranks - {0}):
        if sharing(mean, own.sigma, weights, k) < WORTH_SHARING:
            continue
        left = subtracting(found.factors(shared, k))
        sigma, tails = [], []
        for tau in vectors:
            rest = left(tau)
            values = singular_values(rest, max_rank=q).cpu()
            energy = energy_of(rest)
            tails.append(max(float(energy) - float(values.double().square().sum()), 0))
            sigma.append(values)
        candidates.append(
            replace(
                own,
                shared_rank=k,
                sigma=torch.stack(sigma),
                tail_energy=torch.tensor(tails),
            )
        )
    return candidates


def _candidate(work: Work, row: MatrixSpectra) -> Candidate:
    """Experts only, in the cheapest precision."""
    precision = work.layout.precisions[row.name][0]
    return Candidate(
        0,
        row.price,
        precision.name,
        row.sigma[1:],
        row.tail_energy[1:],
        precision.rounding,
        precision.rounding_dense,
    )


def allocate(work: Work, table: list[MatrixSpectra]) -> list[Tensor]:
    """Ranks (T + 1,) per matrix.

    Where every shared rank is fixed no cross terms are left, greedy is the optimum and there is nothing to learn.
    """
    settings, budget = work.settings, work.budget
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
    table, ranks = upgrade(table, ranks, ladders, work.budget)
    stored_as = {
        row.name: next(p for p in allowed if p.price(*row.shape) == row.price)
        for row, allowed in zip(table, options)
    }
    return table, ranks, stored_as
