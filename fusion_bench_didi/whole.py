"""Matrices that are stored whole: known without decomposing them, and rounded without forming their task vectors."""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .deltas import Delta
from .lowrank import Candidate, MatrixSpectra, Offer, choose, energy_of
from .lowrank.blocks import differences
from .lowrank.sample import optimistic_spectrum, sampled
from .precision import Precision
from .work import SPENT, Work

#: Sides of a sample per direction that is asked about: the short one costs an eigenproblem, the long one a product.
SHORT, LONG = 2, 6
#: Where such a sample does not tell, one of so many times the sides is asked.
ZOOMS = (1, 2)
#: Sharing may pay where the mean task vector holds this much more than that of unrelated tasks.
WORTH_SHARING = 1.5
#: What spectra in float32 differ from energies in float64 by.
ROUNDING = 1e-6


def certainly_whole(work: Work) -> dict[str, bool]:
    """Matrices for which low rank is no choice, so that no expert has to be decomposed; whether sharing may pay for them.

    If every matrix is stored whole or not at all, the energies alone tell the best precisions under the budget and the
    multiplier ``mu`` (error per bit) at which they are the best. A matrix of which even an optimistic spectrum offers
    nothing better at that multiplier is certain. Asked are only matrices that the budget pays for as a whole on average.
    """
    names = [n for n in work.layout.matrices if _asked(work, n)]
    if not names:
        return {}
    offers = [_whole(work, n, work.energy[n]) for n in work.layout.matrices]
    _, mu = choose(offers, work.budget)

    def certain(name: str) -> bool | None:
        """None if it is not."""
        terms = work.task_vectors.terms(name, work.task_vectors.tasks)

        @functools.cache
        def sample(zoom: int) -> list[Tensor]:
            places, last, block = _places(work, name, zoom), None, None
            found = []
            for tuned, base in terms:
                if base is not last:
                    last, block = base, base[places].float()
                found.append(tuned[places].float() - block)
            return found

        if not _no_choice(work, name, sample, work.energy[name], mu):
            return None
        if work.settings.static == "none":
            return False
        # a few rows that hold much may tell this
        few = sample(ZOOMS[0])
        alike = sum(few).square().sum() / sum(x.square().sum() for x in few)
        return bool(alike > WORTH_SHARING) and _alike(work, name) > WORTH_SHARING

    found = work.over("glance", certain, names)
    return {name: shares for name, shares in found if shares is not None}


def still_whole(
    work: Work, name: str, rests: Iterable[Tensor], mu: float
) -> tuple[Tensor, Tensor] | None:
    """Singular values, none, and (T,) energies of what a shared part leaves of experts that were whole without it.

    None if low rank may be a choice at ``mu`` for what is left.
    """
    places = {zoom: _places(work, name, zoom) for zoom in ZOOMS}
    samples: dict[int, list[Tensor]] = {zoom: [] for zoom in ZOOMS}
    energies = []
    for rest in rests:
        energies.append(energy_of(rest).cpu())
        for zoom, where in places.items():
            samples[zoom].append(rest[where].cpu())
    energy = torch.stack(energies)
    if _no_choice(work, name, samples.__getitem__, energy, mu):
        return torch.zeros(len(energy), 0), energy.float()
    return None


def _no_choice(
    work: Work,
    name: str,
    sample: Callable[[int], Sequence[Tensor]],
    energy: Tensor,
    mu: float,
) -> bool:
    """Whether low rank offers nothing better at ``mu`` than whole or nothing, for matrices of which samples are given.

    Args:
        sample: entries (T, a, b) of the task vectors, or of what is left of them, at :func:`_places` of a zoom.
        energy: (T,) squared norms.
    """
    m, n = work.shape(name)
    for zoom in ZOOMS:
        spectra = [
            optimistic_spectrum(part, e, m * n, rank=work.first_guess(name))
            for part, e in zip(sample(zoom), energy.tolist())
        ]
        sigma = torch.stack([values for values, _ in spectra])
        tail = torch.tensor([rest for _, rest in spectra])
        best = _least(_offers(work, name, sigma, tail), mu)
        spread = bool((tail >= SPENT * energy).all())
        if spread and best >= (1 - ROUNDING) * _least(_whole(work, name, energy), mu):
            return True
    return False


def row_of_whole(work: Work, name: str, precision: Precision) -> MatrixSpectra:
    """The table row of a matrix of which nothing but the energy is known."""
    energy = work.energy[name].float()
    return MatrixSpectra(
        name,
        work.shape(name),
        sigma=torch.zeros(len(energy) + 1, 0),
        tail_energy=torch.cat([energy.new_zeros(1), energy]),
        weights=work.weights[name].cpu(),
        price=precision.price(*work.shape(name)),
        fixed_shared=0,
    )


def pack_whole(
    work: Work, name: str, kept: Sequence[bool], precision: Precision
) -> tuple[tuple[None, list[Delta | None]], Tensor]:
    """Stored forms of one matrix, rounded straight from the checkpoints, and (T,) squared errors.

    Args:
        kept: (T,) whether a task's change is stored at all.

    Returns:
        no shared form and one per task; the errors.
    """
    vectors = work.task_vectors
    stored = {task for task, keep in zip(vectors.tasks, kept) if keep}
    deltas: dict[str, Delta] = {}
    errors = dict(zip(vectors.tasks, work.energy[name]))
    for tasks in vectors.together(name):
        some = [task for task in tasks if task in stored]
        if some:
            terms = vectors.terms(name, some)
            made, lost = precision.dense(vectors.infos[name].shape, terms)
            deltas.update(zip(some, made))
            errors.update(zip(some, lost))
    forms = [deltas.get(task) for task in vectors.tasks]
    return (None, forms), torch.stack([errors[task] for task in vectors.tasks])


def _asked(work: Work, name: str) -> bool:
    """Whether a matrix may well be stored whole, and a decomposition would cost more than a sample's."""
    known = name in work.energy and work.metric(name) is None
    # an adapter's factors are decomposed at once
    known = known and all(rank is None for rank in work.task_vectors.ranks(name))
    return known and work.glanced(name) and work.first_guess(name) < work.cap(name)


def _places(work: Work, name: str, zoom: int) -> tuple[Tensor, Tensor]:
    """Rows (a, 1) and columns (b,) of a sample."""
    rank, (m, n) = work.first_guess(name), work.shape(name)
    short, long = zoom * SHORT * rank, zoom * LONG * rank
    sides = (short, long) if m <= n else (long, short)
    return sampled(m, sides[0])[:, None], sampled(n, sides[1])


def _alike(work: Work, name: str) -> float:
    """The energy of the mean task vector over what it would be if tasks were unrelated, 1 to T."""
    tasks, energy = work.task_vectors.tasks, 0.0
    for t, _, x in differences(work.task_vectors.terms(name, tasks)):
        total = x if t == 0 else total + x
        if t == len(tasks) - 1:
            energy += float(total.norm().double().square())
    return energy / float(work.energy[name].sum())


def _offers(work: Work, name: str, sigma: Tensor, tail: Tensor) -> list[Offer]:
    """Experts only, in every precision allowed."""
    return [
        Candidate(
            0,
            p.price(*work.shape(name)),
            p.name,
            sigma,
            tail,
            p.rounding,
            p.rounding_dense,
        ).offer(work.weights[name])
        for p in work.layout.precisions[name]
    ]


def _whole(work: Work, name: str, energy: Tensor) -> list[Offer]:
    """Whole or not at all."""
    return _offers(work, name, torch.zeros(len(energy), 0), energy)


def _least(offers: Sequence[Offer], mu: float) -> float:
    """``error + mu * bits`` of the best offer."""
    return min(lost + mu * bits for lost, bits in (offer.at(mu) for offer in offers))
