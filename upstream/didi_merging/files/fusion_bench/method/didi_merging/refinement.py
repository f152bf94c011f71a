"""
Fitting the truncated factors of one matrix to its task vectors, without data (Eq. 14-16).

The objective is `sum_t || B_0 A_0 + B_t A_t - tau_t ||^2`, minimized by Adam. Letters: `m`
out, `n` in, `r` rank, `T` tasks.
"""

from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .decomposition import Factors

Module = Optional[Factors]
"""None for a module that is stored dense: it takes whatever the shared one leaves."""


def refine(
    shared: Factors,
    experts: Sequence[Module],
    task_vectors: Tensor,
    *,
    steps: int = 300,
    lr: float = 0.01,
) -> Tuple[Factors, List[Module]]:
    """
    Lower the reconstruction error at fixed ranks.

    Args:
        shared: Truncated SVD of the shared matrix.
        experts: Truncated SVDs of the experts.
        task_vectors: (T, m, n).
        steps: Adam steps.
        lr: Relative to factors of a matrix of unit norm; decays to zero by a cosine.

    Returns:
        The better of what was given and where Adam ended.
    """
    fitted = [t for t, expert in enumerate(experts) if expert is not None]
    if not fitted:
        return shared, list(experts)
    targets = task_vectors[fitted]
    size = targets.square().sum().div(len(fitted)).sqrt()
    if not size > 0:
        return shared, list(experts)
    root, ranks = size.sqrt(), [experts[t].rank for t in fitted]
    factors = [*shared, *_padded([experts[t] for t in fitted], targets)]
    factors = [factor / root for factor in factors]
    optimizer = torch.optim.Adam(factors, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        for factor, gradient in zip(factors, _gradients(*factors, targets / size)):
            factor.grad = gradient
        optimizer.step()
        schedule.step()
    up0, down0, up, down = (factor * root for factor in factors)
    ended: List[Module] = list(experts)
    for i, (t, r) in enumerate(zip(fitted, ranks)):
        ended[t] = Factors(up[i, :, :r], down[i, :r])
    new = Factors(up0, down0), ended
    before = _loss(shared, experts, task_vectors)
    return new if _loss(*new, task_vectors) < before else (shared, list(experts))


def _loss(shared: Factors, experts: Sequence[Module], task_vectors: Tensor) -> float:
    common, total = shared.dense(), 0.0
    for tau, expert in zip(task_vectors, experts):
        if expert is not None:
            total += float((tau - common - expert.dense()).square().sum())
    return total


def _padded(experts: Sequence[Factors], like: Tensor) -> Tuple[Tensor, Tensor]:
    """Factors of different ranks side by side; padding is zero on both sides and stays so."""
    rank = max(expert.rank for expert in experts)
    up = like.new_zeros(len(experts), like.shape[1], rank)
    down = like.new_zeros(len(experts), rank, like.shape[2])
    for i, expert in enumerate(experts):
        up[i, :, : expert.rank] = expert.up
        down[i, : expert.rank] = expert.down
    return up, down


def _gradients(b0: Tensor, a0: Tensor, b: Tensor, a: Tensor, tau: Tensor):
    """Of the mean of the squared errors, by products of factors: no (m, n) matrix is formed."""
    weight = tau.new_full((len(tau), 1, 1), 1 / len(tau))
    across, along = a0 @ a.mT, b0.mT @ b  # (T, r0, r)
    mean = (weight * tau).sum(0)
    yield 2 * (b0 @ (a0 @ a0.mT) + (weight * (b @ across.mT)).sum(0) - mean @ a0.mT)
    yield 2 * ((b0.mT @ b0) @ a0 + (weight * (along @ a)).sum(0) - b0.mT @ mean)
    yield 2 * weight * (b0 @ across + b @ (a @ a.mT) - tau @ a.mT)
    yield 2 * weight * (along.mT @ a0 + (b.mT @ b) @ a - b.mT @ tau)
