"""What a matrix cannot have: bounds on its spectrum from a sample of its rows and columns.

The best r directions of a matrix A keep no more of a sample's entries than the best r directions of the sample do, so that
over uniform samples A'' of a rows and b columns

    E[tail_r(A'')] <= (a b / m n) tail_r(A),   tail_r the energy beyond the r leading directions.

A sample whose sides are a few times r costs a small part of a decomposition and tells that a spectrum is not short.
Letters: ``m`` out, ``n`` in, ``q`` directions.
"""

import torch
from torch import Tensor


def sampled(side: int, count: int) -> Tensor:
    """(count,) ascending indices below ``side``, or all of them; a function of the two numbers alone."""
    seed = torch.Generator().manual_seed(side)
    return torch.randperm(side, generator=seed)[:count].sort().values


def optimistic_spectrum(
    samples: Tensor, energy: Tensor, numel: int, *, rank: int
) -> tuple[Tensor, Tensor]:
    """The best that the leading directions of whole matrices can be expected to keep.

    Args:
        samples: (T, a, b) entries of the matrices.
        energy: (T,) squared norms of the matrices.
        numel: m n.
        rank: q, below both sides of the samples.

    Returns:
        (T, q) singular values of which the first k together hold what k directions may hold at most, and the (T,) energies
        beyond.
    """
    rows = samples.float()
    rows = rows if rows.shape[1] <= rows.shape[2] else rows.mT
    held = torch.linalg.eigvalsh(rows @ rows.mT).flip(1).clamp(min=0).double()
    left = held.sum(1, keepdim=True) - held.cumsum(1)[:, :rank]
    kept = energy[:, None] - left * (numel / samples[0].numel())
    kept = kept.clamp(min=0).cummax(1).values
    steps = kept.diff(dim=1, prepend=kept.new_zeros(len(kept), 1))
    return steps.sqrt().float(), energy - kept[:, -1]
