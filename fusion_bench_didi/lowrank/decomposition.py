"""Shared matrix, experts and the exact quadratic form of their truncation, Eq. 2-6 and 11.

Letters: ``m`` out, ``n`` in, ``T`` tasks, ``q`` kept singular values; ``tau_t`` task vectors, ``S`` the shared matrix,
``E_t = tau_t - S`` the experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .factors import Spectrum
from .svd import spectrum

SharedMerge = Literal["mean", "task_arithmetic", "ties", "none"]


def shared_matrix(
    task_vectors: Tensor,
    *,
    how: SharedMerge = "mean",
    weights: Tensor | None = None,
    scale: float = 0.3,
    keep: float = 0.2,
) -> Tensor:
    """A static merge of the task vectors of one matrix, Eq. 2.

    Args:
        task_vectors: (T, m, n).
        how: ``mean``: ``sum_t w_t tau_t / sum_t w_t``; ``task_arithmetic``: ``scale * sum_t tau_t``;
            ``ties``: keep the largest ``keep`` of each task's entries by size, elect the sign of their sum, average
            the entries that agree; ``none``: zero (experts carry everything).
        weights: (T,) for ``mean``; equal if None.
        scale: for ``task_arithmetic``.
        keep: for ``ties``, a fraction of this matrix's entries.

    Returns:
        (m, n).
    """
    if how == "mean":
        if weights is None or not bool((weights > 0).any()):
            return task_vectors.mean(0)
        return torch.einsum("t,tmn->mn", weights / weights.sum(), task_vectors)
    if how == "task_arithmetic":
        return scale * task_vectors.sum(0)
    if how == "ties":
        flat = task_vectors.flatten(1)  # (T, mn)
        count = max(1, round(keep * flat.shape[1]))
        threshold = flat.abs().topk(count, dim=1).values[:, -1:]
        trimmed = torch.where(flat.abs() >= threshold, flat, 0.0)
        agree = (trimmed * trimmed.sum(0).sign()) > 0
        merged = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
        return merged.view_as(task_vectors[0])
    if how == "none":
        return torch.zeros_like(task_vectors[0])
    raise ValueError(
        f"shared={how!r} is not a static merge; choose mean, task_arithmetic, ties or none."
    )


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


@dataclass(frozen=True)
class Decomposition:
    """One matrix: the shared spectrum, one spectrum per task, and their coupling."""

    shared: Spectrum
    experts: tuple[Spectrum, ...]
    coupling: Coupling | None = None


def decompose(
    task_vectors: Tensor,
    shared: Tensor,
    *,
    max_rank: int | None = None,
    coupled: bool = True,
    name: str = "",
) -> Decomposition:
    """Spectra of ``S`` and of every ``E_t = tau_t - S`` (Eq. 3-4).

    Args:
        task_vectors: (T, m, n).
        shared: (m, n).
        max_rank: directions to keep per spectrum; the rest is carried exactly as tails.
        coupled: also compute the coupling, T q^2 numbers.
    """
    residuals = task_vectors - shared
    first = spectrum(shared, max_rank=max_rank, name=name)
    experts = tuple(spectrum(r, max_rank=max_rank, name=name) for r in residuals)
    coupling = _couple(first, experts, shared, residuals) if coupled else None
    return Decomposition(first, experts, coupling)


def _couple(first, experts, shared, residuals) -> Coupling:
    heads, shared_tails, expert_tails, tails = [], [], [], []
    for expert, residual in zip(experts, residuals):
        head = (first.U.mT @ expert.U) * (first.Vh @ expert.Vh.mT)  # (q, q)
        on_shared = ((first.U.mT @ residual) * first.Vh).sum(1)  # u0_i^T E v0_i
        on_expert = ((expert.U.mT @ shared) * expert.Vh).sum(1)  # ut_j^T S vt_j
        shared_tail = on_shared - head @ expert.S
        expert_tail = on_expert - first.S @ head
        tail = (
            (shared * residual).sum()
            - first.S @ head @ expert.S
            - first.S @ shared_tail
            - expert_tail @ expert.S
        )
        heads.append(head)
        shared_tails.append(shared_tail)
        expert_tails.append(expert_tail)
        tails.append(tail)
    return Coupling(*map(torch.stack, (heads, shared_tails, expert_tails, tails)))
