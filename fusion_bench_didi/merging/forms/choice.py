"""The choice of form and precision of every matrix under one budget.

Every matrix is looked at once: experts alone are decomposed as far as the budget reaches, and the other forms offer their
curves while the matrix is in memory. The Lagrangian choice then picks one curve per matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...allocation.lagrangian import choose
from ...allocation.water_filling import greedy
from ...deltas.precision import Precision
from ..context import MergeContext
from ..rank_bounds import RankBounds
from ..spectra import Decomposed, decomposed, extended
from . import EXPERTS, FORMS
from .base import Choice, Form, Look, Sample
from .coded import CODED, Coded
from .early_decision import first_guess, reach_of
from .pricing import as_dense

#: By matrix, in sorted order: spectra of experts alone, and what the other forms offer.
Table = dict[str, Decomposed]
Offers = dict[str, list[Choice]]


@dataclass(frozen=True)
class Ranked:
    """A matrix of modules whose ranks are to be allocated."""

    form: Form
    precision: Precision
    one: Decomposed


def choose_forms(
    context: MergeContext, bounds: RankBounds, samples: Mapping[str, Sample]
) -> tuple[dict[str, Ranked], dict[str, tuple[Choice, Any]]]:
    """The form and the precision of every matrix; and the operating points of those whose form has one instead of ranks.

    Args:
        samples: of the matrices that need not all be decomposed.
    """
    if not context.inventory.competing:
        return {}, {}
    table, offers = _looked_at(context, bounds, samples)
    table = _long_enough(context, bounds, samples, table)
    chosen, multiplier = _chosen(context, bounds, table, offers)
    ranked, placed = {}, {}
    for name, choice in chosen.items():
        if choice.spectra is None:
            placed[name] = choice, choice.curve.point(multiplier)
        else:
            piloted = table[name].piloted
            one = Decomposed(choice.spectra, choice.bases, piloted)
            ranked[name] = Ranked(choice.form, choice.precision, one)
    return ranked, placed


def _looked_at(
    context: MergeContext, bounds: RankBounds, samples: Mapping[str, Sample]
) -> tuple[Table, Offers]:
    """The one look at every matrix."""
    guess = first_guess(context, bounds.budget, samples)

    def look_at(name: str) -> tuple[Decomposed, list[Choice]]:
        look = Look(context, bounds, name, guess, samples.get(name))
        look.experts = _experts_alone(look)
        return look.experts, [c for form in FORMS for c in form.choices(look)]

    found = dict(context.each("decompose", look_at, context.inventory.matrices))
    for name in context.inventory.flat:
        look = Look(context, bounds, name, guess)
        look.experts = _dense_alone(context, name)
        codes = CODED.choices(look) if context.inventory.mostly_flat else ()
        found[name] = look.experts, list(codes)
    rows = sorted(found.items())
    return {n: one for n, (one, _) in rows}, {n: offer for n, (_, offer) in rows}


def _long_enough(
    context: MergeContext,
    bounds: RankBounds,
    samples: Mapping[str, Sample],
    table: Table,
) -> Table:
    """Spectra as long as the ranks that experts alone would get; those of piloted samples are left as they are."""
    while True:
        rows = [one.spectra for one in table.values()]
        ranks = dict(zip(table, greedy(rows, bounds.budget)))
        doubted = {
            n: one
            for n, one in table.items()
            if not (one.piloted and n in samples and samples[n].piloted)
        }
        longer = extended(context, bounds, doubted, ranks)
        if not longer:
            return table
        table = table | longer


def _chosen(
    context: MergeContext, bounds: RankBounds, table: Table, offers: Offers
) -> tuple[dict[str, Choice], float]:
    """One choice per matrix, and the multiplier at which they meet the budget.

    Spectra of coded matrices are extended in ``table`` until they hold what is worth its bits.
    """
    while True:
        options = {
            n: [*EXPERTS.curves(context, n, one), *offers[n]]
            for n, one in table.items()
        }
        picks, multiplier = choose(
            [[choice.curve for choice in row] for row in options.values()],
            bounds.budget,
        )
        chosen = {n: row[i] for (n, row), i in zip(options.items(), picks)}
        ranks = {
            n: torch.tensor([0, *choice.curve.worthy(multiplier)])
            for n, choice in chosen.items()
            if isinstance(choice.form, Coded) and choice.bases
        }
        longer = extended(context, bounds, {n: table[n] for n in ranks}, ranks)
        if not longer:
            break
        table.update(longer)
        for n, one in longer.items():
            others = [c for c in offers[n] if not isinstance(c.form, Coded)]
            offers[n] = [*others, CODED.choice(context, n, one)]
    if not any(choice.curve.at(multiplier)[1] for choice in chosen.values()):
        # nothing is worth its bits, or fits: what modules there are of the lowest rank is what is cheapest
        chosen = {n: row[0] for n, row in options.items()}
    return chosen, multiplier


def experts_only(context: MergeContext, bounds: RankBounds) -> dict[str, Ranked]:
    """Every matrix as experts in the only precision there is, beside the whole shared matrix or nothing."""
    shared_rank = 0 if context.settings.static == "none" else None

    def one(name: str) -> Decomposed:
        reach = bounds.initial_rank(name)
        return decomposed(context, bounds, name, reach=reach, shared_rank=shared_rank)

    names = context.inventory.matrices
    table = dict(context.each("decompose", one, names))
    cheapest = context.inventory.cheapest
    return {n: Ranked(EXPERTS, cheapest(n), table[n]) for n in names}


def _experts_alone(look: Look) -> Decomposed:
    """Spectra of the task vectors, as far as they may be used."""
    context, name = look.context, look.name
    reach, piloted = reach_of(look)
    adapter_rank = look.tensor.adapter_rank
    if not reach and not adapter_rank:
        return replace(_dense_alone(context, name), piloted=piloted)
    found = decomposed(
        context,
        look.bounds,
        name,
        reach=reach or adapter_rank,
        shared_rank=0,
        vectors=look.matrices,
        adapters_only=not reach,
    )
    return replace(found, piloted=piloted)


def _dense_alone(context: MergeContext, name: str) -> Decomposed:
    """Task vectors that are stored dense or not at all."""
    curve = as_dense(context, name, context.energy[name])[0]
    return Decomposed(curve.spectra(name, context.sides(name)), None)
