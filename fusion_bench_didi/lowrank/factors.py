"""Low-rank data types.

Letters: ``m`` out, ``n`` in, ``r`` rank, ``q`` number of kept singular values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankFactors:
    """``up @ down``, PEFT's B and A.

    Args:
        up: (m, r).
        down: (r, n).

    Raises:
        ValueError: if the inner sizes differ.
    """

    up: Tensor
    down: Tensor

    def __post_init__(self):
        if self.up.ndim != 2 or self.down.ndim != 2:
            raise ValueError(
                f"Factors are matrices, got {tuple(self.up.shape)} and {tuple(self.down.shape)}."
            )
        if self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} differ in rank."
            )

    @classmethod
    def zeros(cls, m: int, n: int, *, like: Tensor) -> "LowRankFactors":
        """The rank-0 product of shape (m, n)."""
        return cls(like.new_zeros(m, 0), like.new_zeros(0, n))

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def dense(self) -> Tensor:
        return self.up @ self.down  # (m, n)

    def to(self, *args, **kwargs) -> "LowRankFactors":
        return LowRankFactors(
            self.up.to(*args, **kwargs), self.down.to(*args, **kwargs)
        )


@dataclass(frozen=True)
class Spectrum:
    """The leading part of a singular value decomposition, with what was left out.

    Args:
        U: (m, q) left singular vectors.
        S: (q,) singular values, descending.
        Vh: (q, n) right singular vectors.
        tail_energy: squared Frobenius norm of ``M - U diag(S) Vh``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    tail_energy: float = 0.0

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the whole matrix."""
        return float(self.S.double().square().sum()) + self.tail_energy

    def cut(self, rank: int) -> LowRankFactors:
        """The best rank-``rank`` approximation, Eq. 5, split evenly as in Eq. 14's start:
        ``up = U S^(1/2)``, ``down = S^(1/2) Vh``."""
        root = self.S[:rank].sqrt()
        return LowRankFactors(self.U[:, :rank] * root, root[:, None] * self.Vh[:rank])

    def factors(self, matrix: Tensor, rank: int) -> LowRankFactors:
        """:meth:`cut`; as of a ``Basis``, which needs the matrix."""
        return self.cut(rank)

    def head(self) -> Tensor:
        """``U diag(S) Vh``."""
        return (self.U * self.S) @ self.Vh  # (m, n)


def full_rank(m: int, n: int) -> int:
    """The rank at which a matrix is held exactly (and stored dense)."""
    return min(m, n)


def energy_of(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm in float64 (scalar), rows in the matrix's type: half the cost of float64 throughout.

    Zero only for a zero matrix, also where the squares underflow.
    """
    rows = torch.linalg.vector_norm(matrix, dim=-1).double()
    if not bool(rows.any()) and bool(matrix.any()):
        rows = torch.linalg.vector_norm(matrix.double(), dim=-1)
    return rows.square().sum()
