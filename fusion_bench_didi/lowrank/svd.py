"""The only caller of ``torch.linalg``.

Singular vectors are made unique in sign (the entry of largest size in each left vector is positive), so that
results do not depend on the driver or on the order in which tasks arrive.
"""

import logging

import torch
from torch import Tensor

from .factors import LowRankFactors, Spectrum

log = logging.getLogger(__name__)

#: Above this ratio of the two sides the decomposition goes through the Gram matrix of the short side.
GRAM_ASPECT = 1.5


def spectrum(
    matrix: Tensor, *, max_rank: int | None = None, name: str = ""
) -> Spectrum:
    """Singular value decomposition, Eq. 4 and 7, cut to ``max_rank`` directions.

    What is cut off is carried as ``tail_energy``, so that reconstruction errors stay exact.

    Args:
        matrix: (m, n), finite.
        max_rank: directions to keep; all ``min(m, n)`` if None.
        name: used in log lines only.

    Raises:
        torch.linalg.LinAlgError: if neither the driver nor the float64 fall-back converges.
    """
    work = matrix.to(torch.float32)
    m, n = work.shape
    if max(m, n) > GRAM_ASPECT * min(m, n):
        U, S, Vh = _gram_svd(work)
    else:
        try:
            U, S, Vh = torch.linalg.svd(work, full_matrices=False)
        except torch.linalg.LinAlgError:
            log.warning("SVD of %s did not converge; using its Gram matrix.", name)
            U, S, Vh = _gram_svd(work)
    keep = S.shape[0] if max_rank is None else min(max_rank, S.shape[0])
    U, S, Vh = _fix_signs(U[:, :keep], S[:keep], Vh[:keep])
    if keep == min(m, n):
        tail = 0.0
    else:
        tail = float(work.double().square().sum() - S.double().square().sum())
    return Spectrum(U, S, Vh, max(tail, 0.0))


def singular_values(matrices: Tensor) -> Tensor:
    """All singular values (T, k), descending, of (T, m, n) by the eigenvalues of the smaller Gram matrix in float64."""
    a = matrices.double()
    gram = a @ a.mT if a.shape[-2] <= a.shape[-1] else a.mT @ a
    values = torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0).sqrt()
    return values.to(matrices.dtype)


def _gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD by the eigenvectors of the smaller Gram matrix, accumulated in float64.

    Singular values below 1e-7 of the largest carry no correct digits; their directions stay orthonormal
    because the long side is re-orthogonalised by QR.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    a = (matrix if tall else matrix.mT).double()
    values, vectors = torch.linalg.eigh(a.mT @ a)  # ascending
    right = vectors.flip(-1)  # (short, short)
    scaled = a @ right  # columns are sigma_i u_i
    left, r = torch.linalg.qr(scaled)
    diagonal = r.diagonal()
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(left.dtype)
    U, S, V = left * sign, diagonal.abs(), right
    if not tall:
        U, V = V, U
    return U.to(matrix.dtype), S.to(matrix.dtype), V.mT.to(matrix.dtype)


def _fix_signs(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if U.numel() == 0:
        return U, S, Vh
    pivot = U.gather(0, U.abs().argmax(0, keepdim=True))[0]  # (q,)
    sign = torch.where(pivot < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, S, Vh * sign[:, None]


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
