"""Spectra of the shared matrix and of the experts, Eq. 3-4, and the cross terms of their truncation errors, Eq. 6 and 11.

Letters: ``m`` out, ``n`` in, ``T`` tasks, ``q`` kept singular values; ``tau_t`` task vectors, ``S`` the shared matrix,
``E_t = tau_t - S`` the experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .factored import inner, subtracting
from .factors import LowRankFactors, Matrix, Spectrum, energy_of
from .svd import HalfSVD, half_svd, spectrum


@dataclass(frozen=True)
class Coupling:
    """Inner products between the directions of ``S`` and of each ``E_t``.

    With ``u, v`` singular vectors: ``head[t, i, j] = (u0_i . ut_j)(v0_i . vt_j)``; ``shared_tail[t, i] = u0_i^T E_t' v0_i``
    and ``expert_tail[t, j] = ut_j^T S' vt_j`` where a prime marks the part beyond the kept directions;
    ``tail[t] = <S', E_t'>``.
    """

    head: Tensor  # (T, q, q)
    shared_tail: Tensor  # (T, q)
    expert_tail: Tensor  # (T, q)
    tail: Tensor  # (T,)

    def reduced(self) -> "Coupling":
        """With its large part in bfloat16: half the memory, cross terms to about 0.4 %."""
        return replace(self, head=self.head.bfloat16())


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
    first, experts, parts = spectrum(shared, max_rank=max_rank, name=name), [], []
    for tau in task_vectors:
        residual = tau - shared
        experts.append(spectrum(residual, max_rank=max_rank, name=name))
        if coupled:
            parts.append(_couple(first, experts[-1], shared, residual))
    coupling = Coupling(*map(torch.stack, zip(*parts))) if coupled else None
    return Decomposition(first, tuple(experts), coupling)


def _couple(
    first: Spectrum, expert: Spectrum, shared: Matrix, residual: Matrix
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`Coupling` for one task."""
    head = (first.U.mT @ expert.U) * (first.Vh @ expert.Vh.mT)  # (q, q)
    on_shared = ((first.U.mT @ residual) * first.Vh).sum(1)  # u0_i^T E v0_i
    on_expert = ((expert.U.mT @ shared) * expert.Vh).sum(1)  # ut_j^T S vt_j
    shared_tail = on_shared - head @ expert.S
    expert_tail = on_expert - first.S @ head
    tail = (
        inner(shared, residual)
        - first.S @ head @ expert.S
        - first.S @ shared_tail
        - expert_tail @ expert.S
    )
    return head, shared_tail, expert_tail, tail


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

    def nothing(left_out: float) -> HalfSVD:
        zeros = torch.zeros(q, device=like.device)
        return HalfSVD(zeros.new_zeros(side, 0), zeros, left_out)

    if shared is None or shared_rank == 0:
        first, shared = nothing(0.0), None
    else:
        first = half_svd(shared, max_rank=max(q, shared_rank or 0), name=name)
        if shared_rank is not None:
            shared = first.factors(shared, shared_rank)
            first = HalfSVD(first.vectors, first.S[:q], first.tail_energy)
    left = subtracting(shared)

    def half(matrix: Matrix) -> HalfSVD:
        if factored_only and not isinstance(matrix, LowRankFactors):
            return nothing(float(energy_of(matrix)))
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
