"""Spectra of the shared matrix and of the experts, Eq. 3-4.

Letters: ``m`` out, ``n`` in, ``T`` tasks, ``q`` kept singular values; ``tau_t`` task vectors, ``S`` the shared matrix,
``E_t = tau_t - S`` the experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .coupling import Coupling, _couple
from .factored import subtracting
from .factors import LowRankFactors, Matrix, Spectrum, energy_of
from .svd import HalfSVD, half_svd, spectrum


@dataclass(frozen=True)
class Decomposition:
    """One matrix: the shared spectrum, one spectrum per task, and their coupling; spectra may be halves (``HalfSVD``)."""

    shared: Spectrum | HalfSVD
    experts: tuple[Spectrum | HalfSVD, ...]
    coupling: Coupling | None = None


def decompose(
    task_vectors: Sequence[Matrix],
    shared: Matrix,
    *,
    max_rank: int | None = None,
    coupled: bool = True,
    name: str = "",
) -> Decomposition:
    """Spectra of ``S`` and of every ``E_t = tau_t - S`` (Eq. 3-4).

    Args:
        task_vectors: T of (m, n).
        shared: (m, n).
        max_rank: directions to keep per spectrum; the rest is carried exactly as tails.
        coupled: also compute the coupling, T q^2 numbers.
    """
    first = spectrum(shared, max_rank=max_rank, name=name)
    experts = tuple(
        spectrum(tau - shared, max_rank=max_rank, name=name) for tau in task_vectors
    )
    if not coupled:
        return Decomposition(first, experts)
    parts = (
        _couple(first, expert, shared, tau - shared)
        for expert, tau in zip(experts, task_vectors)
    )
    return Decomposition(first, experts, Coupling(*map(torch.stack, zip(*parts))))


def half_decompose(
    task_vectors: Sequence[Matrix],
    shared: Matrix | None,
    *,
    shared_rank: int | None = None,
    max_rank: int | None = None,
    factored_only: bool = False,
    name: str = "",
) -> Decomposition:
    """Short-side singular vectors only, without coupling, against a shared part of fixed rank if one is given.

    Args:
        shared: (m, n); None for experts only.
        shared_rank: experts are residuals to S cut to this rank, ``tau_t - S_k``; to the whole of S if None.
        factored_only: no directions of dense experts are found.
    """
    like, side = task_vectors[0], min(task_vectors[0].shape)
    q = side if max_rank is None else min(max_rank, side)
    zeros = torch.zeros(q, device=like.device)
    none = HalfSVD(zeros.new_zeros(side, 0), zeros, 0.0)
    if shared is None or shared_rank == 0:
        first, shared = none, None
    else:
        first = half_svd(shared, max_rank=max(q, shared_rank or 0), name=name)
        if shared_rank is not None:
            shared = first.factors(shared, shared_rank)
            first = HalfSVD(first.vectors, first.S[:q], first.tail_energy)
    left = subtracting(shared)

    def half(matrix: Matrix) -> HalfSVD:
        if factored_only and not isinstance(matrix, LowRankFactors):
            left_out = float(energy_of(matrix))
            return HalfSVD(none.vectors.clone(), zeros.clone(), left_out)
        return half_svd(matrix, max_rank=q, name=name)

    return Decomposition(first, tuple(half(left(tau)) for tau in task_vectors))


def half_of(whole: Decomposition) -> Decomposition:
    """The half SVDs of full spectra, as :func:`half_decompose` keeps them."""

    def half(s: Spectrum) -> HalfSVD:
        short = s.U if s.U.shape[0] < s.Vh.shape[1] else s.Vh.mT  # as ``half_svd`` does
        return HalfSVD(short, s.S, s.tail_energy)

    return Decomposition(
        half(whole.shared), tuple(map(half, whole.experts)), whole.coupling
    )
