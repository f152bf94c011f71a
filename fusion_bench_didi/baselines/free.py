"""FREE-Merging (Zheng & Wang, ICCV 2025): high-pass filtered task vectors, and sparse experts.

Letters: ``m`` out, ``n`` in, ``d`` kept fraction.
"""

import math

import torch
from torch import Tensor


def ideal_filter(m: int, n: int, cutoff: float) -> Tensor:
    """The paper's ideal high-pass: which frequencies are kept, (m, n), in the order of ``torch.fft.fft2``.

    Args:
        cutoff: frequency radius D0 up to which all is removed, 1 = the highest frequency along one axis.
    """
    rows, columns = 2 * torch.fft.fftfreq(m)[:, None], 2 * torch.fft.fftfreq(n)
    return torch.hypot(rows, columns) > cutoff


def released_filter(m: int, n: int, cutoff: float) -> Tensor:
    """The released code's filter: indices within ``cutoff * min(m, n)`` of the centre of the *unshifted* spectrum.

    It removes a corner region around zero frequency whose size depends on the shape: 0.02 % of a square matrix, 68 % of
    a 4:1 one.
    """
    rows, columns = torch.arange(m)[:, None] - m // 2, torch.arange(n) - n // 2
    return torch.hypot(rows.float(), columns.float()) <= cutoff * min(m, n)


def high_pass(matrices: Tensor, kept: Tensor) -> Tensor:
    """The real part of each matrix without the frequencies that are not kept.

    Args:
        matrices: (..., m, n).
        kept: (m, n) boolean.
    """
    return torch.fft.ifft2(torch.fft.fft2(matrices) * kept.to(matrices.device)).real


def top_of_rows(matrix: Tensor, fraction: float) -> Tensor:
    """The entries of largest size of each row, at least one; zero elsewhere."""
    count = max(1, int(fraction * matrix.shape[-1] + 1e-9))
    index = matrix.abs().topk(count, dim=-1).indices
    return torch.zeros_like(matrix).scatter(-1, index, matrix.gather(-1, index))


def compensation(sparse: Tensor, filtered: Tensor, fraction: float) -> float:
    """``mu = -log10(d) E|kept entries of tau| / E|v|`` with ``v`` the filtered task vector; 0 where either is zero."""
    kept, rest = sparse[sparse != 0].abs(), filtered.abs().mean()
    if len(kept) == 0 or rest == 0:
        return 0.0
    return float(-math.log10(fraction) * kept.mean() / rest)
