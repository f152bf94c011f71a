"""What a shared matrix beside the experts would do: looked into where its spectrum says that it might pay."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ...allocation.experts_curve import ExpertsCurve
from ...allocation.spectra import MatrixSpectra
from ...deltas.base import Delta
from ...deltas.precision import Precision
from ...lowrank.factored import inner, subtracting
from ...lowrank.factors import Matrix, energy_of, full_rank
from ...lowrank.overlap import mean_overlap
from ...lowrank.row_blocks import materialize, minus, squared_norms
from ...lowrank.svd import HalfSVD, half_svd, singular_values
from ..context import Work
from ..reconstruction import pack_shared
from .early_decision import WORTH_SHARING, still_whole


def beside_low_rank(
    work: Work, name: str, own: ExpertsCurve, level: float
) -> list[ExpertsCurve]:
    """Experts beside a shared matrix that might pay at so much error per bit.

    Looked into is only what pays if all tasks gain as much as the one that holds most of what is shared.

    Args:
        own: experts only, in the precision in which they are best.
    """
    vectors, weights = work.read(name), work.weights[name]
    q, full = own.sigma.shape[1], full_rank(*work.shape(name))
    shared = work.shared(name, vectors)
    found = half_svd(shared, max_rank=q, name=name)
    ranks = [
        k
        for k in _shared_ranks(found, own, full, weights, level)
        if mean_overlap(found.S.cpu(), own.sigma, weights, k) >= WORTH_SHARING
    ]
    if not ranks:
        return []
    energy = own.sigma.square().sum(1) + own.tail_energy
    alike = torch.stack([inner(tau, shared).cpu() for tau in vectors])
    first = int((alike / energy.clamp(min=1e-300)).argmax())
    candidates = []
    for k in ranks:
        part = shared if k == full else found.factors(shared, k)
        left = subtracting(part)
        sigma, tail = _spectra([left(vectors[first])], q)
        one = replace(own, shared_rank=k, sigma=sigma, tail_energy=tail)
        if not _may_pay(own, one, first, weights, level):
            continue
        sigma, tail = _spectra(map(left, vectors), q)
        candidates.append(replace(own, shared_rank=k, sigma=sigma, tail_energy=tail))
    return candidates


def beside_whole(
    work: Work, name: str, own: ExpertsCurve, level: float
) -> list[ExpertsCurve]:
    """As :func:`beside_low_rank` for experts that are whole alone, and have no singular values; no expert is formed."""
    vectors = work.task_vectors
    q, full = work.first_guess(name), full_rank(*work.shape(name))
    terms = vectors.terms(name, vectors.tasks, work.device)
    shared = work.shared_of(name, terms)
    found = half_svd(shared, max_rank=q, name=name)
    candidates = []
    for k in _shared_ranks(found, own, full, work.weights[name], level):
        part = shared if k == full else found.factors(shared, k)
        rest = minus(terms, part)
        tail = squared_norms(rest).cpu()
        sigma = own.sigma
        if not still_whole(work, name, rest, tail, level):
            sigma, tail = _spectra(map(materialize, rest), q)
        candidates.append(replace(own, shared_rank=k, sigma=sigma, tail_energy=tail))
    nothing = HalfSVD(found.vectors[:, :0], found.S[:0], 0.0)
    work.store.put(name, (found, *[nothing] * len(terms)))
    return candidates


def _may_pay(
    own: ExpertsCurve, beside: ExpertsCurve, task: int, weights: Tensor, level: float
) -> bool:
    """Whether sharing pays if every task gains, in parts of its energy, what one does.

    Args:
        own: of all tasks, without sharing.
        beside: of that task, with it.
    """
    one = slice(task, task + 1)
    alone = replace(own, sigma=own.sigma[one], tail_energy=own.tail_energy[one])
    (before, most), (after, bits) = (
        candidate.offer(weights[one]).at(level)
        for candidate in (alone, replace(beside, shared_rank=0))
    )
    gain = before + level * most - (after + level * bits)
    energy = weights * (own.sigma.square().sum(1) + own.tail_energy)
    shared = min(beside.shared_rank * own.rate.per_rank, own.rate.dense)
    return gain * float(energy.sum() / energy[task]) > level * shared


def _shared_ranks(
    mean: HalfSVD, own: ExpertsCurve, full: int, weights: Tensor, level: float
) -> list[int]:
    """Ranks of a shared matrix that might pay at so much error per bit."""
    q, rate = len(mean.S), own.rate
    gain = weights.sum() * mean.S.cpu().square() / rate.per_rank
    # a shared component gains at most this much per bit; where it gains T levels, every expert would hold it too
    times = [1, len(weights)]
    if not own.sigma.shape[1] and own.rounding_dense:
        times.append(1 / own.rounding_dense)  # whole experts lose no more of it
    ranks = {int((gain >= level * many).sum()) for many in times}
    most = min(q, rate.cap) if mean.tail_energy > 0 else rate.cap
    return sorted({full if k >= most else k for k in ranks} - {0})


def _spectra(matrices: Iterable[Matrix], rank: int) -> tuple[Tensor, Tensor]:
    """(T, q) leading singular values and (T,) energies beyond them."""
    sigma, tails = [], []
    for matrix in matrices:
        values = singular_values(matrix, max_rank=rank).cpu()
        energy = float(energy_of(matrix))
        tails.append(max(energy - float(values.double().square().sum()), 0))
        sigma.append(values)
    return torch.stack(sigma), torch.tensor(tails)


def _shared_beside_whole(
    work: Work, row: MatrixSpectra, basis: HalfSVD, precision: Precision
) -> Delta:
    """The shared form of experts that are whole: they take what it leaves, and have no say in it."""
    vectors, rank = work.task_vectors, row.shared_rank
    shape = vectors.infos[row.name].shape
    terms = vectors.terms(row.name, vectors.tasks, work.device)
    shared = work.shared_of(row.name, terms)
    if rank < row.full:
        shared = basis.factors(shared, rank)
    return pack_shared(shared, rank, shape=shape, precision=precision)
