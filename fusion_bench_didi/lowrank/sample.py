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
    sample: Tensor, energy: float, numel: int, *, rank: int
) -> tuple[Tensor, float]:
    """The best that the leading directions of the whole matrix can be expected to keep.

    Args:
        sample: (a, b) entries of the matrix.
        energy: squared norm of the matrix.
        numel: m n.
        rank: q, below both sides of the sample.

    Returns:
        (q,) singular values of which the first k together hold what k directions may hold at most, and the energy beyond.
    """
    rows = sample.float()
    rows = rows if rows.shape[0] <= rows.shape[1] else rows.mT
    held = torch.linalg.eigvalsh(rows @ rows.mT).flip(0).clamp(min=0).double()
    left = held.sum() - held.cumsum(0)[:rank]
    kept = (energy - left * (numel / sample.numel())).clamp(min=0).cummax(0).values
    steps = kept.diff(prepend=kept.new_zeros(1))
    return steps.sqrt().float(), energy - float(kept[-1])
