"""What will probably be stored of each matrix, before any is decomposed for all tasks.

Three looks, each at what the one before left in doubt:

- energies alone tell the best precisions under the budget, and the multiplier ``mu`` (error per bit) at which they are the
  best, if every matrix is stored whole or not at all;
- a sample of rows and columns bounds what low rank, or something shared, may gain at that ``mu`` (``lowrank/sample.py``);
- the singular values of one task vector, of the task whose sample looks most like low rank, stand for those of all tasks,
  and those of the mean for what they have in common.

Where whole matrices come within :data:`WORTH` of the least error that these allow, all of them are stored whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...allocation.experts_curve import ExpertsCurve
from ...lowrank.factors import full_rank
from ...lowrank.row_blocks import Difference, materialize, mean_of
from ...lowrank.spectrum_bounds import optimistic_spectrum, sampled
from ...lowrank.svd import singular_values
from ..context import SPENT, Work
from .pricing import as_whole, chosen, cost, in_all_precisions, least

#: Part of the least error that is not worth a decomposition of every task vector.
WORTH = 0.1
#: Sharing beside whole experts may pay where the mean holds this much more than that of unrelated tasks.
WORTH_SHARING = 1.5
#: Sides of a sample per direction that is asked about: the short one costs an eigenproblem, the long one a product.
SHORT, LONG = 2, 6
#: Decompositions reach this much further than one task's does.
MARGIN = 1.15
#: What spectra in float32 differ from energies in float64 by.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Outlook:
    """What is expected of matrices.

    Args:
        whole: matrices whose experts are stored whole or not at all; whether something may be shared beside them.
        reach: ranks up to which others will be needed.
    """

    whole: Mapping[str, bool] = field(default_factory=dict)
    reach: Mapping[str, int] = field(default_factory=dict)


def outlook(work: Work) -> Outlook:
    """Of the matrices that the budget pays for as a whole on average; the others are in neither mapping."""
    names = [n for n in work.inventory.matrices if _asked(work, n)]
    if not names:
        return Outlook()
    options = {n: as_whole(work, n, work.energy[n]) for n in work.inventory.matrices}
    picks, mu, error = chosen(work, options)
    seen = dict(work.over("glance", lambda n: _seen(work, n, mu), names))
    reach: dict[str, int] = {}
    doubts = {name: sample.task for name, sample in seen.items() if sample.doubtful}
    if doubts:
        pilot = lambda n: _pilot(work, n, doubts[n])  # noqa: E731
        for name, more in work.over("pilot", pilot, doubts):
            options[name] = options[name] + more
        better, other, lower = chosen(work, options)
        if lower < (1 - WORTH) * error:
            picks, mu = better, other
            reach = {n: r for n in doubts if (r := _reach(work, n, picks[n], mu))}
    whole = [name for name in names if name not in reach]
    usual = error / sum(_energy(work, name) for name in options)

    def gains(name: str, held: Tensor) -> bool:
        gain, lost = _by_sharing(work, name, picks[name], mu, held)
        return gain > WORTH * max(lost, usual * _energy(work, name))

    def all_of_mean(name: str) -> Tensor:
        """At the price of one direction: no rank gains more."""
        return torch.tensor([seen[name].alike / len(work.energy[name])])

    alike = [n for n in whole if seen[n].alike > WORTH_SHARING and mu > 0]
    if work.settings.static == "none":
        alike = []
    alike = [name for name in alike if gains(name, all_of_mean(name))]
    found = work.over("pilot", lambda n: gains(n, _held_by_mean(work, n)), alike)
    shares = {name for name, gained in found if gained}
    return Outlook({name: name in shares for name in whole}, reach)


def still_whole(
    work: Work, name: str, terms: Sequence[Difference], energy: Tensor, mu: float
) -> bool:
    """Whether what a shared part leaves of experts that were whole without it gains nothing by low rank.

    Args:
        terms: what is left, T differences (m, n).
        energy: (T,) squared norms of them.
    """
    samples = _samples(work, name, terms)
    task, doubtful = _most_doubtful(work, name, samples, energy, mu)
    if not doubtful:
        return True
    low_rank = _like(
        work, name, singular_values(materialize(terms[task])), energy, task
    )
    alone = min(as_whole(work, name, energy), key=lambda c: cost(work, name, c, mu))
    gain = cost(work, name, alone, mu) - least(work, name, low_rank, mu)
    return gain <= WORTH * alone.offer(work.weights[name]).at(mu)[0]


@dataclass(frozen=True)
class _Sample:
    """What a sample of one matrix tells.

    Args:
        task: whose matrix looks most like low rank.
        doubtful: whether low rank may be the better choice.
        alike: energy of the mean over that of the mean of unrelated tasks, 1 to T.
    """

    task: int
    doubtful: bool
    alike: float


def _seen(work: Work, name: str, mu: float) -> _Sample:
    terms = work.task_vectors.terms(name, work.task_vectors.tasks)
    samples = _samples(work, name, terms)
    alike = samples.sum(0).square().sum() / samples.square().sum()
    task, doubtful = _most_doubtful(work, name, samples, work.energy[name], mu)
    return _Sample(task, doubtful, float(alike))


def _most_doubtful(
    work: Work, name: str, samples: Tensor, energy: Tensor, mu: float
) -> tuple[int, bool]:
    """The task whose matrix looks most like low rank, and whether low rank may be the better choice for any."""
    numel, rank = work.task_vectors.infos[name].numel, work.first_guess(name)
    sigma, tail = optimistic_spectrum(samples, energy, numel, rank=rank)
    at_best = least(work, name, in_all_precisions(work, name, 0, sigma, tail), mu)
    whole = least(work, name, as_whole(work, name, energy), mu)
    spread = bool((tail >= SPENT * energy).all())
    part = (tail / energy.clamp(min=1e-300)).masked_fill(energy == 0, torch.inf)
    return int(part.argmin()), not spread or at_best < (1 - ROUNDING) * whole


def _pilot(work: Work, name: str, task: int) -> list[ExpertsCurve]:
    """Low rank as far as one task tells."""
    (terms,) = work.task_vectors.terms(
        name, [work.task_vectors.tasks[task]], work.device
    )
    return _like(
        work, name, singular_values(materialize(terms)), work.energy[name], task
    )


def _reach(work: Work, name: str, pick: ExpertsCurve, mu: float) -> int:
    """The rank up to which experts will be needed, 0 where they are whole or nothing."""
    full = full_rank(*work.shape(name))
    ranks = pick.ranks(work.weights[name], mu, full)
    longest = int(ranks.where(ranks < full, 0).max())
    return min(int(MARGIN * longest) + 8, work.cap(name)) if longest else 0


def _held_by_mean(work: Work, name: str) -> Tensor:
    """(q,) what the leading directions of the mean hold of the energy of all tasks, in parts of it."""
    terms = work.task_vectors.terms(name, work.task_vectors.tasks, work.device)
    values = singular_values(mean_of(terms, work.weights[name])).double().cpu()
    weight = float(work.weights[name].sum())
    return weight * values.square().cumsum(0) / max(_energy(work, name), 1e-300)


def _by_sharing(
    work: Work, name: str, alone: ExpertsCurve, mu: float, held: Tensor
) -> tuple[float, float]:
    """What whole experts gain by a shared matrix of some rank that takes the same part of the energy of each.

    Args:
        alone: the best without.
        held: (q,) that part, by rank; the last is the whole matrix's.

    Returns:
        ``error + mu * bits`` less that, and the error alone.
    """
    options = []
    for rank in {len(held)} | {2**i for i in range(len(held).bit_length() - 1)}:
        left = max(1 - float(held[rank - 1]), 0.0)
        options += as_whole(work, name, left * work.energy[name], shared=rank)
    gain = cost(work, name, alone, mu) - least(work, name, options, mu)
    return gain, alone.offer(work.weights[name]).at(mu)[0]


def _like(
    work: Work, name: str, values: Tensor, energy: Tensor, task: int
) -> list[ExpertsCurve]:
    """Experts of the spectrum of one task's, each of its own energy."""
    sigma = (energy / energy[task]).sqrt().float()[:, None] * values.cpu()
    return in_all_precisions(work, name, 0, sigma, torch.zeros(len(energy)))


def _asked(work: Work, name: str) -> bool:
    """Whether a matrix may well be stored whole, and a decomposition would cost more than a sample's."""
    known = name in work.energy and work.metric(name) is None
    # an adapter's factors are decomposed at once
    known = known and all(rank is None for rank in work.task_vectors.ranks(name))
    return known and work.glanced(name) and work.first_guess(name) < work.cap(name)


def _samples(work: Work, name: str, terms: Sequence[Difference]) -> Tensor:
    """(T, a, b) entries of differences, at the same places."""
    rank, (m, n) = work.first_guess(name), work.shape(name)
    sides = (SHORT * rank, LONG * rank) if m <= n else (LONG * rank, SHORT * rank)
    rows, columns = sampled(m, sides[0]), sampled(n, sides[1])

    def part(matrix: Tensor) -> Tensor:
        some = matrix.index_select(0, rows.to(matrix.device))
        return some.index_select(1, columns.to(matrix.device)).float()

    samples, last, block = [], None, None
    for matrix, less in terms:
        if less is not last:
            last, block = less, None if less is None else part(less)
        x = part(matrix)
        samples.append((x if block is None else x - block).cpu())
    return torch.stack(samples)


def _energy(work: Work, name: str) -> float:
    """Weighted, of all tasks."""
    return float((work.weights[name].double() * work.energy[name]).sum())
