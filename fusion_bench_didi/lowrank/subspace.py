"""Low-rank approximations that follow a matrix, without a new decomposition each time it changes."""

import torch
from torch import Tensor

from .factors import LowRankFactors
from .svd import spectrum

#: Directions followed per direction kept: the error of the kept ones falls by the gap to the first one left out.
FOLLOWED = 1.8


class Subspace:
    """Follows the leading singular subspace of a slowly changing matrix by subspace iteration.

    Args:
        start: its row and column space are the first guess, and its rank is kept; random directions of a fixed seed are
            added to follow.
    """

    def __init__(self, start: LowRankFactors):
        m, n = start.up.shape[0], start.down.shape[1]
        self._tall, self._rank = m >= n, start.rank
        known = start.down.mT if self._tall else start.up  # (s, r)
        side = known.shape[0]
        more = min(int(FOLLOWED * self._rank) + 1, side) - self._rank
        seed = torch.Generator().manual_seed(side)
        fresh = torch.randn(side, more, generator=seed).to(known)
        self._vectors = torch.linalg.qr(torch.cat([known, fresh], 1)).Q

    def step(self, matrix: Tensor) -> tuple[LowRankFactors, float]:
        """One iteration towards the matrix (m, n).

        Returns:
            its projection, the factors as in Eq. 14's start, and the squared norm of that projection; repeated for the
            same matrix the latter never falls.
        """
        a = matrix if self._tall else matrix.mT  # (l, s)
        vectors = torch.linalg.qr(a.mT @ (a @ self._vectors)).Q  # (s, p)
        long = a @ vectors
        values, turn = torch.linalg.eigh(long.mT @ long)
        turn = turn.flip(-1)
        self._vectors = vectors @ turn
        k = self._rank
        sigma = values.flip(-1)[:k].clamp(min=torch.finfo(a.dtype).tiny).sqrt()
        root = sigma.sqrt()
        scaled, rows = (long @ turn[:, :k]) / root, (self._vectors[:, :k] * root).mT
        factors = (scaled, rows) if self._tall else (rows.mT, scaled.mT)
        return LowRankFactors(*factors), float(sigma.double().square().sum())


def subspace_step(
    matrix: Tensor, factors: LowRankFactors, *, iterations: int = 1
) -> LowRankFactors:
    """Improve a low-rank approximation of ``matrix`` without decomposing it.

    Each half step is exact in one factor given the span of the other (least squares), so the error
    ``||matrix - up @ down||`` never grows; repeated, it converges to the truncated SVD.

    Args:
        matrix: (m, n).
        factors: the current approximation; its row space is the start.
        iterations: pairs of half steps.
    """
    if factors.rank == 0:
        return factors
    down = factors.down
    for _ in range(iterations):
        rows = torch.linalg.qr(down.mT).Q  # (n, r)
        columns = torch.linalg.qr(matrix @ rows).Q  # (m, r)
        down = columns.mT @ matrix  # (r, n)
    return LowRankFactors(columns, down)


def balanced(factors: LowRankFactors) -> LowRankFactors:
    """The same product as ``U S^(1/2)``, ``S^(1/2) Vh`` (Eq. 14's start), from the factors alone."""
    if factors.rank == 0:
        return factors
    q_up, r_up = torch.linalg.qr(factors.up)
    q_down, r_down = torch.linalg.qr(factors.down.mT)
    inner = spectrum(r_up @ r_down.mT)
    root = inner.S.sqrt()
    return LowRankFactors(
        (q_up @ inner.U) * root, root[:, None] * (inner.Vh @ q_down.mT)
    )
