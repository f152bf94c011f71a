"""Experts beside a truncated mean of the task vectors: looked into where its spectrum says that it might pay.

Experts are residuals to the shared part as it is stored, so that it only ever costs what it gives.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...allocation.curves import cheapest, cost, least
from ...allocation.experts_curve import ExpertsCurve
from ...lowrank.factored import inner, subtracting
from ...lowrank.factors import Matrix
from ...lowrank.overlap import mean_overlap
from ...lowrank.row_blocks import materialize, minus, squared_norms
from ...lowrank.svd import HalfSVD, half_svd, singular_values
from .base import Choice, Look
from .early_decision import WORTH, still_dense
from .experts import Experts, choices_of
from .pricing import as_dense, in_all_precisions

#: Sharing may pay where the mean holds this much more than that of unrelated tasks.
WORTH_SHARING = 1.5
#: ... which is not looked into where a sample of all entries holds less: chance makes two hundredths.
WORTH_A_LOOK = 1.1


class SharedMean(Experts):
    """Low-rank or dense experts beside a shared matrix of a rank that is fixed by the choice."""

    name = "shared_mean"

    def choices(self, look: Look) -> Iterator[Choice]:
        settings = look.context.settings
        if settings.static == "none" or settings.residual != "truncated":
            return
        if look.guess.multiplier <= 0:
            return  # the budget pays for everything
        yield from (
            _beside_dense(self, look) if look.dense else _beside_low_rank(self, look)
        )


def _beside_low_rank(form: SharedMean, look: Look) -> Iterator[Choice]:
    """Beside a shared matrix that might pay at the multiplier.

    Looked into is only what pays if all tasks gain as much as the one that holds most of what is shared.
    """
    if look.sample is not None and look.sample.alike < WORTH_A_LOOK:
        return
    context, name, weights = look.context, look.name, look.weights
    multiplier, vectors = look.guess.multiplier, look.matrices
    curves = in_all_precisions(context, name, *look.experts.spectra.of_experts)
    own = cheapest(curves, multiplier)
    q = own.sigma.shape[1]
    shared = context.static_merge(name, vectors)
    found = half_svd(shared, max_rank=q, name=name)
    ranks = [
        k
        for k in _shared_ranks(found, own, multiplier)
        if mean_overlap(found.S.cpu(), own.sigma, weights, k) >= WORTH_SHARING
    ]
    if not ranks:
        return
    energy = own.sigma.square().sum(1) + own.tail_energy
    alike = torch.stack([inner(tau, shared).cpu() for tau in vectors])
    first = int((alike / energy).masked_fill(energy == 0, -torch.inf).argmax())
    for k in ranks:
        part = shared if k == own.full else found.factors(shared, k)
        left = subtracting(part)
        one = half_svd(left(vectors[first]), max_rank=q, name=name)
        beside = replace(
            own,
            rate=own.rate.limited(own.rate.most and max(own.rate.most - k, 0)),
            shared_rank=k,
            sigma=one.S.cpu()[None],
            tail_energy=torch.tensor([one.tail_energy]),
            weights=weights[first : first + 1],
        )
        if _may_pay(own, beside, first, multiplier):
            yield from _choices(form, look, k, part, found, map(left, vectors), q)


def _beside_dense(form: SharedMean, look: Look) -> Iterator[Choice]:
    """As :func:`_beside_low_rank` for experts that are dense alone, and have no singular values; no expert is formed."""
    context, name, sample = look.context, look.name, look.sample
    if sample is None or sample.alike <= WORTH_SHARING:
        return
    multiplier = look.guess.multiplier
    own = cheapest(as_dense(context, name, look.energy), multiplier)
    # all of the mean at the price of one direction: no rank gains more
    most = torch.tensor([sample.alike / len(look.energy)])
    if not _worth_sharing(look, own, most):
        return
    shared = context.static_merge_of(name, look.differences)
    values = singular_values(shared).double().cpu()
    energy = max(context.weighted_energy(name), 1e-300)
    held = float(look.weights.sum()) * values.square().cumsum(0) / energy
    if not _worth_sharing(look, own, held):
        return
    q = look.bounds.initial_rank(name)
    found = half_svd(shared, max_rank=q, name=name)
    for k in _shared_ranks(found, own, multiplier):
        part = shared if k == own.full else found.factors(shared, k)
        rest = minus(look.differences, part)
        tail = squared_norms(rest).cpu()
        if not still_dense(look, rest, tail):
            experts = map(materialize, rest)
            yield from _choices(form, look, k, part, found, experts, q)
            continue
        nothing = HalfSVD(found.vectors[:, :0], found.S[:0], 0.0)
        bases = context.store.keep((found, *[nothing] * len(rest)))
        sigma = torch.zeros(len(rest), 0)
        yield from choices_of(form, context, name, k, sigma, tail, bases, part)


def _choices(
    form: SharedMean,
    look: Look,
    shared_rank: int,
    part: Matrix,
    shared: HalfSVD,
    residuals: Iterable[Matrix],
    rank: int,
) -> list[Choice]:
    """Low-rank experts that are what a shared part (m, n) leaves."""
    name = look.name
    found = [half_svd(rest, max_rank=rank, name=name) for rest in residuals]
    sigma = torch.stack([one.S.cpu() for one in found])
    tail = torch.tensor([one.tail_energy for one in found])
    bases = look.context.store.keep((shared, *found))
    return choices_of(form, look.context, name, shared_rank, sigma, tail, bases, part)


def _worth_sharing(look: Look, own: ExpertsCurve, held: Tensor) -> bool:
    """Whether dense experts gain by a shared matrix of some rank that takes the same part of the energy of each.

    Args:
        own: the best without.
        held: (q,) that part, by rank; the last is the whole matrix's.
    """
    context, name, multiplier = look.context, look.name, look.guess.multiplier
    options = []
    for rank in {len(held)} | {2**i for i in range(len(held).bit_length() - 1)}:
        left = max(1 - float(held[rank - 1]), 0.0)
        options += as_dense(context, name, left * look.energy, shared_rank=rank)
    gain = cost(own, multiplier) - least(options, multiplier)
    usual = look.guess.relative_error * context.weighted_energy(name)
    return gain > WORTH * max(own.at(multiplier)[0], usual)


def _may_pay(
    own: ExpertsCurve, beside: ExpertsCurve, task: int, multiplier: float
) -> bool:
    """Whether sharing pays if every task gains, in parts of its energy, what one does.

    Args:
        own: of all tasks, without sharing.
        beside: of that task, with it.
    """
    one = slice(task, task + 1)
    alone = replace(
        own,
        sigma=own.sigma[one],
        tail_energy=own.tail_energy[one],
        weights=own.weights[one],
    )
    gain = cost(alone, multiplier) - cost(replace(beside, shared_rank=0), multiplier)
    energy = own.weights * (own.sigma.square().sum(1) + own.tail_energy)
    shared = own.rate.of(beside.shared_rank, own.full)
    return gain * float(energy.sum() / energy[task]) > multiplier * shared


def _shared_ranks(mean: HalfSVD, own: ExpertsCurve, multiplier: float) -> list[int]:
    """Ranks of a shared matrix that might pay at so much error per bit."""
    q, rate, weights = len(mean.S), own.rate, own.weights
    gain = weights.sum() * mean.S.cpu().square() / rate.per_rank
    # a shared component gains at most this much per bit; where it gains T multipliers, every expert would hold it too
    times = [1, len(weights)]
    if not own.sigma.shape[1] and own.rounding_dense:
        times.append(1 / own.rounding_dense)  # dense experts lose no more of it
    ranks = {int((gain >= multiplier * many).sum()) for many in times}
    if rate.most is not None:
        return sorted({min(k, rate.most) for k in ranks} - {0})
    most = min(q, rate.cap) if mean.tail_energy > 0 else rate.cap
    return sorted({own.full if k >= most else k for k in ranks} - {0})


SHARED_MEAN = SharedMean()
