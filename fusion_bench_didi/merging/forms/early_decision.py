"""Which matrices need no decomposition, because their experts will be stored dense whatever it would find.

Energies alone tell the multiplier (error per bit) at which dense matrices in the best precisions meet the budget. A sample of
rows and columns, taken while the energies are, bounds what low rank may gain at that multiplier
(``lowrank/spectrum_bounds.py``). Where that leaves a doubt, the singular values of one task vector, of the task whose sample
looks most like low rank, stand for those of all tasks. Where dense experts come within :data:`WORTH` of the least error
that these allow, they are not decomposed.

Where entropy codes compete, dense experts may be the better choice at any budget. There the singular values of one task
vector are found while the energies are, scaled to those of the others: they tell the multiplier, whether the experts are
coded whole, and how far they have to be decomposed where they are not.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...allocation.curves import Curve, cheapest, cost, least
from ...allocation.experts_curve import ExpertsCurve
from ...allocation.lagrangian import choose
from ...lowrank.row_blocks import Difference, materialize, wide
from ...lowrank.spectrum_bounds import optimistic_spectrum, sampled
from ...lowrank.svd import SKETCH_SIDE, singular_values
from ...task_vectors.tensor import ChangedTensor
from ..context import MergeContext
from ..rank_bounds import REACH, RankBounds
from ..spectra import SPENT
from .base import FirstGuess, Look, Sample
from .coded import coded_curve
from .pricing import as_dense, in_all_precisions

#: Part of the error that is not worth a decomposition of every task vector.
WORTH = 0.1
#: Sides of a sample per direction that is asked about: the short one costs an eigenproblem, the long one a product.
SHORT, LONG = 2, 6
#: Decompositions reach this much further than one task's does.
MARGIN = 1.15
#: How much further than the pilot's the directions of other tasks may go.
APART = 1.5
#: Codes may compete below so many bits per entry on average: from there on fixed widths lose under a hundredth.
MOST_CODED = 4
#: Up to this side the pilot's singular values are all found, beyond it as many as the budget may reach if each of their
#: numbers takes so many bits.
SHORT_ENOUGH, LEAST_BITS = 1024, 1.5
#: Part of the error of experts that are coded whole that is not worth a decomposition of every task vector.
WORTH_DIRECTIONS = 0.03
#: Sides of the sample by which the task vector is found that looks most like low rank, in the same unit as a rank.
GLIMPSE = 24
#: Part of the energy beyond which directions are not worth having in any integer precision, and of which a loss is none.
EXACT = 1e-5
#: What spectra in float32 differ from energies in float64 by.
ROUNDING = 1e-6


def first_guess(
    context: MergeContext, budget: int, samples: Mapping[str, Sample]
) -> FirstGuess:
    """The choice of precisions if every matrix is stored dense, as codes of piloted spectra, or not at all.

    The error is that of dense matrices in fixed widths alone.
    """
    names = context.inventory.competing
    options: list[list[Curve]] = [
        [*as_dense(context, name, context.energy[name])] for name in names
    ]
    picks, multiplier = choose(options, budget)
    error = sum(row[i].at(multiplier)[0] for row, i in zip(options, picks))
    relative_error = error / max(sum(map(context.weighted_energy, names)), 1e-300)
    piloted = {name: one for name, one in samples.items() if one.piloted}
    if piloted:
        for name, row in zip(names, options):
            if name in piloted:
                row.append(coded_curve(context, name, piloted[name].sigma))
        _, multiplier = choose(options, budget)
    return FirstGuess(multiplier, relative_error)


def sample_of(
    bounds: RankBounds, tensor: ChangedTensor, energy: Tensor
) -> Sample | None:
    """A sample, where a matrix may well be stored dense and a decomposition would cost more than the sample's."""
    name, adapters = tensor.name, tensor.adapters
    if name not in bounds.inventory.matrices or not bool((energy > 0).any()):
        return None
    if tensor.factored:
        return None  # adapters' factors are decomposed at once
    rank = bounds.initial_rank(name)
    pays_dense = bounds.even_share_pays_dense(name)
    piloted = not pays_dense
    if adapters:
        # a pilot takes longer than what it saves where few directions of the others are looked at
        piloted = pays_dense or 2 * rank >= bounds.rank_bound(name)
    if piloted and _codes_compete(bounds, tensor):
        return _pilot(bounds, tensor, energy)
    if adapters or not pays_dense or rank >= bounds.rank_bound(name):
        return None
    return _bounded(tensor.differences(), energy, rank)


def _bounded(differences: Sequence[Difference], energy: Tensor, rank: int) -> Sample:
    """The best that low rank up to a rank may keep of T differences (m, n), by a sample of them."""
    samples, numel = _samples(differences, rank), differences[0][0].numel()
    bound = optimistic_spectrum(samples, energy, numel, rank=rank)
    return Sample(*bound, _alike(samples))


def _codes_compete(bounds: RankBounds, tensor: ChangedTensor) -> bool:
    """Whether codes of all entries may be chosen, of a matrix whose decompositions take long."""
    share = bounds.even_share(tensor.name)
    return (
        bounds.settings.factor_dtype == "auto"
        and share < MOST_CODED * tensor.numel
        and bounds.inventory.most(tensor.name) is None
        and not tensor.large
        and min(bounds.inventory.sides[tensor.name]) >= SKETCH_SIDE
    )


def _pilot(bounds: RankBounds, tensor: ChangedTensor, energy: Tensor) -> Sample | None:
    """Singular values of the task vector that looks most like low rank, and those of adapters; None where there are no others."""
    name, differences = tensor.name, tensor.differences()
    samples = _samples(differences, GLIMPSE).double()
    gram = samples @ samples.mT
    norms = samples.square().sum((1, 2))
    steep = gram.square().sum((1, 2)) / norms.square().clamp(min=1e-300)
    unasked = energy == 0
    unasked[tensor.adapters] = True
    if bool(unasked.all()):
        return None
    task = int(steep.masked_fill(unasked, -1.0).argmax())
    share, sides = bounds.even_share(name), bounds.inventory.sides[name]
    most = int(REACH * share / (LEAST_BITS * sum(sides))) + 8
    if min(sides) <= SHORT_ENOUGH:
        most = min(sides)
    values = singular_values(materialize(differences[task]), max_rank=most)
    sigma = _scaled(values, energy, task)
    for adapter in tensor.adapters:
        known = singular_values(tensor.factors(adapter), max_rank=len(values))
        sigma[adapter] = known.cpu()
    tail = (energy - sigma.double().square().sum(1)).clamp(min=0.0)
    return Sample(sigma, tail, _alike(samples), piloted=True)


def _alike(samples: Tensor) -> float:
    """Energy of the mean of samples (T, a, b) over that of the mean of unrelated ones."""
    energy = float(samples.square().sum())
    return float(samples.sum(0).square().sum()) / energy if energy else 1.0


def reach_of(look: Look) -> tuple[int, bool]:
    """The rank up to which experts are to be decomposed, 0 where all but those of adapters are dense; and whether one task's
    spectrum told.
    """
    name, sample = look.name, look.sample
    if sample is None:
        return look.bounds.initial_rank(name), False
    if sample.piloted:
        return _reach_of_codes(look, sample)

    def difference(task: int) -> Difference:
        return look.tensor.differences([task])[0]

    found = _low_rank(look, sample, look.energy, difference)
    if found is None:
        return 0, False
    values, low_rank = found
    # matrices of low rank leave others more than the even share
    share = 2 * REACH * look.bounds.even_share(name)
    left = 1 - values.double().square().cumsum(0) / values.double().square().sum()
    longest = min(_affordable(low_rank, share), int((left > EXACT).sum()) + 1)
    return look.bounds.reach(name, int(MARGIN * longest) + 8), True


def _reach_of_codes(look: Look, sample: Sample) -> tuple[int, bool]:
    """As :func:`reach_of`, of experts that may be coded; undecided where all that the pilot knows is worth its bits."""
    context, name, multiplier = look.context, look.name, look.guess.multiplier
    low_rank = coded_curve(context, name, sample.sigma)
    known = torch.zeros_like(sample.sigma[:, : look.tensor.adapter_rank])
    known[look.tensor.adapters] = sample.sigma[look.tensor.adapters, : known.shape[1]]
    whole = coded_curve(context, name, known)
    worthy, known = max(low_rank.worthy(multiplier)), sample.sigma.shape[1]
    if worthy >= known and known < min(look.sides):
        return look.bounds.initial_rank(name), False
    (best, bits), (lost, more) = low_rank.at(multiplier), whole.at(multiplier)
    exact = best < EXACT * context.weighted_energy(name) and bits < more
    if (
        not exact
        and lost + multiplier * more - (best + multiplier * bits)
        < WORTH_DIRECTIONS * lost
    ):
        return 0, True
    reach, further = (
        look.bounds.reach(name, int(part * worthy) + 8) for part in (MARGIN, APART)
    )
    if further == look.bounds.rank_bound(name):
        reach = further  # costs little more than that, and is not done again
    return reach, True


def still_dense(look: Look, rest: Sequence[Difference], energy: Tensor) -> bool:
    """Whether what a shared part leaves of experts that were dense without it gains nothing by low rank.

    Args:
        rest: T differences (m, n).
        energy: (T,) squared norms of them.
    """
    bound = _bounded(rest, energy, look.bounds.initial_rank(look.name))
    return _low_rank(look, bound, energy, rest.__getitem__) is None


def _low_rank(
    look: Look,
    bound: Sample,
    energy: Tensor,
    difference: Callable[[int], Difference],
) -> tuple[Tensor, list[ExpertsCurve]] | None:
    """Singular values of the task's matrix that looks most like low rank, and the curves of experts that are all like it, each of
    its own energy; None where low rank is not worth a decomposition.

    Args:
        bound: the best that low rank may keep.
        energy: (T,) squared norms.
        difference: of a task, (m, n).
    """
    context, name, multiplier = look.context, look.name, look.guess.multiplier
    alone = cheapest(as_dense(context, name, energy), multiplier)
    dense, tail = cost(alone, multiplier), bound.tail
    at_best = least(in_all_precisions(context, name, bound.sigma, tail), multiplier)
    spread = bool((tail >= SPENT * energy).all())
    if spread and at_best >= (1 - ROUNDING) * dense:
        return None
    part = (tail / energy.clamp(min=1e-300)).masked_fill(energy == 0, torch.inf)
    task = int(part.argmin())
    values = singular_values(materialize(difference(task)))
    curves = in_all_precisions(
        context, name, _scaled(values, energy, task), torch.zeros(len(energy))
    )
    gain = dense - least(curves, multiplier)
    return (values, curves) if gain > WORTH * alone.at(multiplier)[0] else None


def _scaled(values: Tensor, energy: Tensor, task: int) -> Tensor:
    """(T, q) singular values (q,) of one task vector at the energies (T,) of all."""
    return (energy / energy[task]).sqrt().float()[:, None] * values.cpu()


def _affordable(curves: Sequence[ExpertsCurve], bits: float) -> int:
    """The rank of least error, in any precision, of experts that cost so many bits each at most."""
    found = []
    for curve in (one.curve for one in curves):
        ranks = max(int((curve.bits[:-1] <= bits).sum()), 1)
        error, rank = curve.error.sum(0)[:ranks].min(0)
        found.append((float(error), int(rank)))
    return min(found)[1]


def _samples(differences: Sequence[Difference], rank: int) -> Tensor:
    """(T, a, b) entries of differences (m, n), at the same places."""
    m, n = differences[0][0].shape
    sides = (SHORT * rank, LONG * rank) if m <= n else (LONG * rank, SHORT * rank)
    rows, columns = sampled(m, sides[0]), sampled(n, sides[1])

    def part(matrix: Tensor) -> Tensor:
        some = matrix.index_select(0, rows.to(matrix.device))
        return wide(some.index_select(1, columns.to(matrix.device)))

    samples, last, block = [], None, None
    for matrix, base in differences:
        if base is not last:
            last, block = base, None if base is None else part(base)
        x = part(matrix)
        samples.append((x if block is None else x - block).float().cpu())
    return torch.stack(samples)
