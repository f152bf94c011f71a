"""The shared matrix before it is cut: a static merge of the task vectors, Eq. 2.

Letters: ``m`` out, ``n`` in, ``T`` tasks, ``q`` kept singular values; ``tau_t`` task vectors, ``S`` the shared matrix,
``E_t = tau_t - S`` the experts.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .factored import Densified, as_dense, zero_like
from .factors import Matrix
from .row_blocks import shares

#: The static merge behind the shared matrix: the mean of the task vectors, their scaled sum, TIES, or none.
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
        weights = torch.ones(tasks) if weights is None else weights
        return _weighted_sum(task_vectors, shares(weights))
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
    for matrix, weight in zip(matrices, weights, strict=True):
        if isinstance(total, Tensor):
            total.add_(as_dense(matrix), alpha=weight)
        else:
            term = matrix * weight
            total = term if total is None else total + term
    return total
