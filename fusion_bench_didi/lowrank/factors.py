"""Low-rank data types.

Letters: ``m`` out, ``n`` in, ``r`` rank, ``q`` number of kept singular values.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankFactors:
    """``up @ down``, PEFT's B and A: a matrix that is never multiplied out unless :meth:`dense` is called.

    It takes part in products, sums and differences like the matrix that it stands for. A sum is factored where both
    terms are, of the sum of their ranks, and dense where one of them is.

    Args:
        up: (m, r).
        down: (r, n).

    Raises:
        ValueError: if the inner sizes differ.
    """

    up: Tensor
    down: Tensor

    def __post_init__(self):
        up, down = tuple(self.up.shape), tuple(self.down.shape)
        if len(up) != 2 or len(down) != 2 or up[1] != down[0]:
            raise ValueError(
                f"up {up} and down {down} differ in rank, or are no matrices."
            )

    @classmethod
    def zeros(cls, m: int, n: int, *, like: Tensor) -> "LowRankFactors":
        """The rank-0 product of shape (m, n)."""
        return cls(like.new_zeros(m, 0), like.new_zeros(0, n))

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    @property
    def device(self) -> torch.device:
        return self.up.device

    @property
    def mT(self) -> "LowRankFactors":
        return LowRankFactors(self.down.mT, self.up.mT)

    def __matmul__(self, right: Tensor) -> Tensor:
        return self.up @ (self.down @ right)

    def __rmatmul__(self, left: Tensor) -> Tensor:
        return (left @ self.up) @ self.down

    def __mul__(self, scale: float) -> "LowRankFactors":
        return LowRankFactors(self.up * scale, self.down)

    def __add__(self, other: "Tensor | LowRankFactors") -> "Tensor | LowRankFactors":
        if isinstance(other, Tensor):
            return self.dense().add_(other)
        return LowRankFactors(
            torch.cat([self.up, other.up], 1), torch.cat([self.down, other.down])
        )

    def __sub__(self, other: "Tensor | LowRankFactors") -> "Tensor | LowRankFactors":
        if isinstance(other, Tensor):
            return self.dense().sub_(other)
        return self + other * -1.0

    def __rsub__(self, other: Tensor) -> Tensor:
        return other - self.dense()

    def energy(self) -> Tensor:
        """Squared Frobenius norm in float64 (scalar), by two r x r Gram matrices."""
        up, down = self.up.double(), self.down.double()
        return ((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0)

    def balanced(self) -> "LowRankFactors":
        """The same product with two factors of about one norm, so that neither leaves the range of its type where the product
        does not; scaled by powers of two, which rounds nothing."""
        largest = [
            float(part.abs().max()) if part.numel() else 0.0
            for part in (self.up, self.down)
        ]
        if not all(0 < value < math.inf for value in largest):
            return self
        steps = round((math.log2(largest[1]) - math.log2(largest[0])) / 2)
        shift = self.up.new_tensor(steps)
        return LowRankFactors(
            torch.ldexp(self.up, shift), torch.ldexp(self.down, -shift)
        )

    def dense(self) -> Tensor:
        return self.up @ self.down  # (m, n)

    def to(self, *args, **kwargs) -> "LowRankFactors":
        return LowRankFactors(
            self.up.to(*args, **kwargs), self.down.to(*args, **kwargs)
        )

    def cpu(self) -> "LowRankFactors":
        return self.to("cpu")


#: A matrix as its entries, or as a product that is not multiplied out.
Matrix = Tensor | LowRankFactors


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

    def factors(self, matrix: Matrix, rank: int) -> LowRankFactors:
        """:meth:`cut`; as of a ``HalfSVD``, which needs the matrix."""
        return self.cut(rank)

    def head(self) -> Tensor:
        """``U diag(S) Vh``."""
        return (self.U * self.S) @ self.Vh  # (m, n)


def full_rank(m: int, n: int) -> int:
    """The rank at which a matrix is held exactly (and stored dense)."""
    return min(m, n)


def energy_of(matrix: Matrix) -> Tensor:
    """Squared Frobenius norm in float64 (scalar), rows in the matrix's type: half the cost of float64 throughout.

    Zero only for a zero matrix, also where the squares underflow.
    """
    if isinstance(matrix, LowRankFactors):
        return matrix.energy()
    rows = torch.linalg.vector_norm(matrix, dim=-1).double()
    if not bool(rows.any()) and bool(matrix.any()):
        rows = torch.linalg.vector_norm(matrix.double(), dim=-1)
    return rows.square().sum()
