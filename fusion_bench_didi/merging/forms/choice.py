"""The first pass where form and precision of every matrix are chosen together with the ranks (``lowrank.candidates``).

Offered are, in every precision allowed: experts only; experts beside a truncated shared matrix, where the mean holds more
than unrelated tasks would give; and common subspaces, where the budget is small enough for them to pay.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ...allocation.experts_curve import ExpertsCurve
from ...allocation.lagrangian import Curve, choose
from ...allocation.spectra import MatrixSpectra
from ...allocation.water_filling import greedy
from ...deltas.precision import Precision
from ..context import Work
from .dense import row_of_whole
from .early_decision import outlook
from .pricing import in_all_precisions
from .shared_mean import beside_low_rank, beside_whole
from .tucker import Common, common_key, common_offers

Table = list[MatrixSpectra]
StoredAs = dict[str, Precision]


@dataclass(frozen=True)
class FirstPass:
    """What the first pass found.

    Args:
        table: rows of the matrices whose ranks are to be allocated.
        stored_as: precision of these.
        common: the other matrices.
    """

    table: Table
    stored_as: StoredAs
    common: dict[str, Common]

    @property
    def common_bits(self) -> int:
        return sum(common.bits for common in self.common.values())


@dataclass(frozen=True)
class _Option:
    """An offer, the precision that it is in, and the candidate it is made of (None for common subspaces)."""

    offer: Curve
    precision: Precision
    candidate: ExpertsCurve | None = None


def joint_pass(work: Work) -> FirstPass:
    """Choose how each matrix is stored, then decompose against what was chosen."""
    names = work.inventory.matrices
    cheapest = {n: work.inventory.precisions[n][0] for n in names}
    expected = outlook(work)
    whole, reach = expected.whole, {n: work.first_guess(n) for n in names}
    reach = {n: q for n, q in {**reach, **expected.reach}.items() if n not in whole}
    rows = work.rows("decompose", reach, cheapest, dict.fromkeys(names, 0))
    rows += [row_of_whole(work, n, cheapest[n], work.energy[n]) for n in whole]
    table = sorted(rows, key=lambda row: row.name)
    while longer := work.extended(
        table, greedy(table, work.budget), cheapest, but=expected.reach
    ):
        table = longer
    own = {row.name: (row.sigma[1:], row.tail_energy[1:]) for row in table}
    options = {n: _options(work, n, 0, *own[n]) for n in names}
    picks, mu = _chosen(work, options)
    sharable = work.settings.residual == "truncated" and mu > 0
    sharers = [n for n in names if sharable and whole.get(n, True)]
    alone = {n: options[n][i].candidate for n, i in zip(names, picks)}

    def look(name: str) -> list[ExpertsCurve]:
        beside = beside_whole if name in whole else beside_low_rank
        return beside(work, name, alone[name], mu)

    if work.settings.static != "none":
        for name, more in work.over("share", look, sharers):
            for c in more:
                options[name] += _options(
                    work, name, c.shared_rank, c.sigma, c.tail_energy
                )
    unsettled = [n for n in sharers if n not in whole]
    for name, offers in work.over("share", lambda n: common_offers(work, n), unsettled):
        options[name] += [_Option(*offer) for offer in offers]
    if any(len(options[n]) > len(work.inventory.precisions[n]) for n in names):
        picks, mu = _chosen(work, options)
    chosen = {n: options[n][i] for n, i in zip(names, picks)}
    common = {
        n: Common(o.offer.sizes(mu), o.offer, o.precision)
        for n, o in chosen.items()
        if o.candidate is None
    }
    for name in names:
        work.store.drop(name if name in common else common_key(name))
    stored_as = {n: o.precision for n, o in chosen.items() if n not in common}
    picked = {n: chosen[n].candidate for n in stored_as}
    mixed = {n: c.shared_rank for n, c in picked.items() if c.shared_rank}
    reach = {n: q for n in mixed if (q := picked[n].sigma.shape[1])}
    with_shared = work.rows("share", reach, stored_as, mixed)
    with_shared += [
        row_of_whole(work, n, stored_as[n], picked[n].tail_energy, shared=mixed[n])
        for n in mixed
        if n not in reach
    ]
    rows = {row.name: row for row in (*table, *with_shared)}
    rows = [replace(rows[n], rate=p.rate(*work.shape(n))) for n, p in stored_as.items()]
    return FirstPass(rows, stored_as, common)


def _chosen(
    work: Work, options: Mapping[str, list[_Option]]
) -> tuple[list[int], float]:
    return choose([[o.offer for o in row] for row in options.values()], work.budget)


def _options(work: Work, name: str, shared: int, *spectra: Tensor) -> list[_Option]:
    """Experts of these spectra beside a shared part of some rank."""
    found = in_all_precisions(work, name, shared, *spectra)
    pairs = zip(found, work.inventory.precisions[name])
    return [_Option(c.offer(work.weights[name]), p, c) for c, p in pairs]
