"""Factored matrices (``LowRankFactors``) where task vectors are of low rank from the start, as LoRA adapters are.

Decompositions go by QR of the factors and the SVD of what is left between them, an r x r core; several matrices are
worked on in a frame around all of them. The m x n product is formed by :func:`as_dense` only. Letters: ``m`` out, ``n``
in, ``r`` rank, ``p`` numerical rank, ``T`` tasks.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import LowRankFactors, Matrix

#: Singular values below this part of the terms' joint size are what float32 rounding leaves where terms cancel.
ROUNDING = 2 * torch.finfo(torch.float32).eps


def product_svd(factors: LowRankFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of ``up @ down`` in ``2 (m + n) r^2`` operations, in float64.

    Returns:
        U (m, p), S (p,) descending and V (n, p); directions that are nothing but rounding are left out, so that a
        product stored at rank p is exact and never of more.

    Raises:
        torch.linalg.LinAlgError: if the core's decomposition does not converge.
    """
    up, down = factors.up.double(), factors.down.double()
    left, inner_left = torch.linalg.qr(up)
    right, inner_right = torch.linalg.qr(down.mT)
    U, S, Vh = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
    size = (up.square().sum(0) * down.square().sum(1)).sum().sqrt()
    p = int((S > ROUNDING * size).sum())
    return left @ U[:, :p], S[:p], right @ Vh[:p].mT


def as_dense(matrix: Matrix) -> Tensor:
    """The matrix as a dense (m, n) tensor."""
    return matrix.dense() if isinstance(matrix, LowRankFactors) else matrix


def zero_like(matrix: Matrix) -> Matrix:
    """Zero in the same form; of rank 0 where factored."""
    if isinstance(matrix, LowRankFactors):
        return LowRankFactors.zeros(*matrix.shape, like=matrix.up)
    return torch.zeros_like(matrix)


def as_product(matrix: Matrix) -> LowRankFactors:
    """The matrix itself as a product, of no more than full rank."""
    m, n = matrix.shape
    if isinstance(matrix, LowRankFactors) and matrix.rank <= min(m, n):
        return matrix
    dense = as_dense(matrix)
    eye = torch.eye(min(m, n), dtype=dense.dtype, device=dense.device)
    return LowRankFactors(*((dense, eye) if m >= n else (eye, dense)))


def inner(a: Matrix, b: Matrix) -> Tensor:
    """``sum_ij a_ij b_ij``; one of the two may be multiplied out only where the other is dense."""
    if isinstance(a, LowRankFactors) and isinstance(b, LowRankFactors):
        return ((a.up.mT @ b.up) * (a.down @ b.down.mT)).sum()
    return torch.dot(as_dense(a).reshape(-1), as_dense(b).reshape(-1))


def subtracting(part: Matrix | None) -> Callable[[Matrix], Matrix]:
    """``tau -> tau - part``, factored where both are; for dense task vectors a factored part is multiplied out once.

    Args:
        part: None for nothing.
    """
    if part is None or (isinstance(part, LowRankFactors) and part.rank == 0):
        return lambda tau: tau
    dense = functools.cache(lambda: as_dense(part))
    return lambda tau: tau - (part if isinstance(tau, LowRankFactors) else dense())


def all_factored(task_vectors: Sequence[Matrix]) -> bool:
    """Whether no task vector is dense."""
    return all(isinstance(tau, LowRankFactors) for tau in task_vectors)


class Densified(Sequence):
    """Task vectors, multiplied out one at a time when they are asked for."""

    def __init__(self, task_vectors: Sequence[Matrix]):
        self._task_vectors = task_vectors

    def __len__(self) -> int:
        return len(self._task_vectors)

    def __getitem__(self, index: int) -> Tensor:
        return as_dense(self._task_vectors[index])


@dataclass(frozen=True)
class JointBasis:
    """Orthonormal bases around factored matrices: inside, they are small dense matrices of the same singular values,
    norms and inner products.

    Args:
        left: (m, p) around all column spaces.
        right: (n, p') around all row spaces.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def around(cls, matrices: Iterable[LowRankFactors]) -> "JointBasis":
        matrices = list(matrices)
        columns = torch.cat([matrix.up for matrix in matrices], 1)
        rows = torch.cat([matrix.down for matrix in matrices])
        return cls(torch.linalg.qr(columns).Q, torch.linalg.qr(rows.mT).Q)

    def cores(self, matrices: Iterable[LowRankFactors]) -> Tensor:
        """The matrices inside, (T, p, p')."""
        return torch.stack([self.inside(matrix).dense() for matrix in matrices])

    def inside(self, matrix: LowRankFactors) -> LowRankFactors:
        """``left^T matrix right``, (p, p')."""
        return LowRankFactors(self.left.mT @ matrix.up, matrix.down @ self.right)

    def outside(self, matrix: LowRankFactors) -> LowRankFactors:
        """The (m, n) matrix that is ``matrix`` inside."""
        return LowRankFactors(self.left @ matrix.up, matrix.down @ self.right.mT)
