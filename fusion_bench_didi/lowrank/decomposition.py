"""Shared matrix, experts and the exact quadratic form of their truncation, Eq. 2-6 and 11.

Letters: ``m`` out, ``n`` in, ``T`` tasks, ``q`` kept singular values; ``tau_t`` task vectors, ``S`` the shared matrix,
``E_t = tau_t - S`` the experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .factored import Densified, accumulated, inner, subtracting, zero_like
from .factors import Matrix, Spectrum
from .svd import Basis, leading, spectrum

SharedMerge = Literal["mean", "task_arithmetic", "ties", "none"]


def shared_matrix(
    task_vectors: Sequence[Matrix],
    *,
    how: SharedMerge = "mean",
    weights: Tensor | None = None,
    scale: float = 0.3,
    keep: float = 0.2,
) -> Matrix:
    """A static merge of the task vectors of one matrix, Eq. 2.

    Args:
        task_vectors: T of (m, n); read one at a time for ``mean`` and ``task_arithmetic``.
        how: ``mean``: ``sum_t w_t tau_t / sum_t w_t``; ``task_arithmetic``: ``scale * sum_t tau_t``;
            ``ties``: keep the largest ``keep`` of each task's entries by size, elect the sign of their sum, average
            the entries that agree; ``none``: zero (experts carry everything).
        weights: (T,) for ``mean``; equal if None.
        scale: for ``task_arithmetic``.
        keep: for ``ties``, a fraction of this matrix's entries.

    Returns:
        (m, n); factored where all task vectors are, but for ``ties``, which looks at entries.
    """
    tasks = len(task_vectors)
    if how == "mean":
        if weights is None or not bool((weights > 0).any()):
            weights = torch.ones(tasks)
        return _weighted_sum(task_vectors, (weights / weights.sum()).tolist())
    if how == "task_arithmetic":
        return _weighted_sum(task_vectors, [scale] * tasks)
    if how == "ties":
        dense = Densified(task_vectors)
        flat = torch.stack([tau.flatten() for tau in dense])  # (T, mn)
        count = max(1, round(keep * flat.shape[1]))
        threshold = flat.abs().topk(count, dim=1).values[:, -1:]
        trimmed = torch.where(flat.abs() >= threshold, flat, 0.0)
        agree = (trimmed * trimmed.sum(0).sign()) > 0
        merged = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
        return merged.view(task_vectors[0].shape)
    if how == "none":
        return zero_like(task_vectors[0])
    raise ValueError(
        f"shared={how!r} is not a static merge; choose mean, task_arithmetic, ties or none."
    )


def _weighted_sum(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    total: Matrix | None = None
    for matrix, weight in zip(matrices, weights):
        total = accumulated(total, matrix, weight)
    return total


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
    """One matrix: the shared spectrum, one spectrum per task, and their coupling; spectra may be halves (``Basis``)."""

    shared: Spectrum | Basis
    experts: tuple[Spectrum | Basis, ...]
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


def halves(
    task_vectors: Sequence[Matrix],
    shared: Matrix | None,
    *,
    shared_rank: int | None = None,
    max_rank: int | None = None,
    name: str = "",
) -> Decomposition:
    """As :func:`decompose`, uncoupled, short-side vectors only, against a shared part of fixed rank if one is given.

    Args:
        shared: (m, n); None for experts only.
        shared_rank: experts are residuals to S cut to this rank, ``tau_t - S_k``; to the whole of S if None.
    """
    like, side = task_vectors[0], min(task_vectors[0].shape)
    q = side if max_rank is None else min(max_rank, side)
    zeros = torch.zeros(q, device=like.device)
    none = Basis(zeros.new_zeros(side, 0), zeros, 0.0)
    if shared is None or shared_rank == 0:
        first, shared = none, None
    else:
        first = leading(shared, max_rank=max(q, shared_rank or 0), name=name)
        if shared_rank is not None:
            shared = first.factors(shared, shared_rank)
            first = Basis(first.vectors, first.S[:q], first.tail_energy)
    left = subtracting(shared)
    return Decomposition(
        first,
        tuple(leading(left(tau), max_rank=q, name=name) for tau in task_vectors),
    )


def halved(whole: Decomposition) -> Decomposition:
    """Of full spectra, what :func:`halves` keeps."""

    def half(s: Spectrum) -> Basis:
        short = s.U if s.U.shape[0] < s.Vh.shape[1] else s.Vh.mT  # as ``leading`` does
        return Basis(short, s.S, s.tail_energy)

    return Decomposition(
        half(whole.shared), tuple(map(half, whole.experts)), whole.coupling
    )


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
