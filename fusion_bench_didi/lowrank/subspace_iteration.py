"""Low-rank approximations that follow a matrix, without a new decomposition each time it changes."""

import torch
from torch import Tensor

from .eigen import eigen_of
from .factors import LowRankFactors

#: Products of other widths than multiples of this are slower than those of the next larger multiple.
WIDTH = 16
#: Least sine of the angle between a direction and those before it at which a Cholesky factor is trusted.
INDEPENDENT = 0.1
#: Lengths below this cannot be told from none: their squares are below what float32 holds.
SHORTEST = 2.0**-63


class Subspace:
    """Follows the leading singular subspace of a slowly changing matrix by subspace iteration.

    Args:
        start: its row and column space are the first guess, and its rank is kept; random directions of a fixed seed are
            added to follow.
        following: directions followed per direction kept: the error of the kept ones falls by the gap to the first one
            that is not followed.
    """

    def __init__(self, start: LowRankFactors, *, following: float):
        m, n = start.up.shape[0], start.down.shape[1]
        self._tall, self._rank = m >= n, start.rank
        known = start.down.mT if self._tall else start.up  # (s, r)
        side = known.shape[0]
        followed = min(-(-int(following * self._rank) // WIDTH) * WIDTH, side)
        more = max(followed - self._rank, 0)
        seed = torch.Generator().manual_seed(side)
        fresh = torch.randn(side, more, generator=seed).to(known)
        self._vectors = torch.linalg.qr(torch.cat([known, fresh], 1)).Q

    def step(self, matrix: Tensor) -> tuple[LowRankFactors, float]:
        """One iteration towards the matrix (m, n): two products with it.

        Returns:
            its projection on the best of the long sides of what is followed, the factors as in Eq. 14's start, and the
            squared norm of that projection; repeated for the same matrix the latter never falls.
        """
        a = matrix if self._tall else matrix.mT  # (l, s)
        tiny = torch.finfo(a.dtype).tiny
        long = _orthonormal(a @ self._vectors)  # (l, p)
        short = long.mT @ a  # (p, s)
        length = short.norm(dim=1, keepdim=True).clamp(min=SHORTEST)
        self._vectors = (short / length).mT
        values, turn = eigen_of(short @ short.mT)  # ascending
        kept = values.flip(-1)[: self._rank].clamp(min=tiny)
        turn, root = turn.flip(-1)[:, : self._rank], kept.sqrt().sqrt()
        far, near = (long @ turn) * root, (turn.mT @ short) / root[:, None]
        factors = (far, near) if self._tall else (near.mT, far.mT)
        return LowRankFactors(*factors), float(kept.double().sum())


def _orthonormal(columns: Tensor) -> Tensor:
    """A basis (l, p) of the columns, by their Gram matrix, which is faster, where they are far from dependent."""
    gram = columns.mT @ columns
    size = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    root, failed = torch.linalg.cholesky_ex(gram * size * size[:, None])
    if bool(failed) or float(root.diagonal().min()) < INDEPENDENT:
        return torch.linalg.qr(columns).Q
    turn = torch.linalg.solve_triangular(root, size.diag(), upper=False).mT
    return columns @ turn


def subspace_step(matrix: Tensor, factors: LowRankFactors) -> LowRankFactors:
    """Improve a low-rank approximation of ``matrix`` without decomposing it.

    Each half step is exact in one factor given the span of the other (least squares), so the error
    ``||matrix - up @ down||`` never grows; repeated, it converges to the truncated SVD.

    Args:
        matrix: (m, n).
        factors: the current approximation; its row space is the start.
    """
    if factors.rank == 0:
        return factors
    rows = torch.linalg.qr(factors.down.mT).Q  # (n, r)
    columns = torch.linalg.qr(matrix @ rows).Q  # (m, r)
    return LowRankFactors(columns, columns.mT @ matrix)
