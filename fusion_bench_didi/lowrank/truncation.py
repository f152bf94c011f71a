"""Smooth truncation of singular values, Eq. 8."""

import torch
from torch import Tensor


def gate(rank: Tensor, size: int, *, beta: float) -> Tensor:
    """``w_i(k) = 0.5 tanh(beta (k - i)) + 0.5`` for i = 1..size, shifted by half a rank.

    The paper's index starts at 1, which puts the middle of the step on component k itself: with large beta half
    of the k-th singular value is lost. The half-rank shift makes w(k) pass through 1/2 between the components k
    and k + 1, so that an integer k keeps exactly k of them. As beta grows it becomes the hard truncation.

    Args:
        rank: (...) continuous ranks k.
        size: number of singular values q.
        beta: steepness, per rank.

    Returns:
        (..., q) weights in [0, 1].
    """
    index = torch.arange(1, size + 1, device=rank.device, dtype=rank.dtype)
    return 0.5 * torch.tanh(beta * (rank[..., None] + 0.5 - index)) + 0.5


def hard_gate(rank: Tensor, size: int) -> Tensor:
    """The limit of :func:`gate` for beta to infinity at integer ranks: 1 for i <= k, else 0."""
    index = torch.arange(1, size + 1, device=rank.device, dtype=torch.float32)
    return (index <= rank[..., None]).to(torch.float32)
