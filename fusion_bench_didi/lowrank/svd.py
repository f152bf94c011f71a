"""Singular values and vectors by the cheapest way that the rank in reach allows.

All ways first find the singular vectors of the *short* side; the long side follows by one product. With ``l`` the long
side, ``s`` the short one and ``q`` directions:

- Gram: eigenvectors of the s x s Gram matrix, ``l s^2`` operations and an eigenproblem of size s. In float64 up to
  :data:`DOUBLE_SIDE`; in float32 beyond it, where singular values under 3e-4 of the largest, 1e-7 of its energy, are noise.
- Block Krylov range finder (``krylov.py``), where q is well below s: ``6 l s p`` operations for p = 1.9 q directions
  searched, and an eigenproblem of size p.
- The same within the Gram matrix, where the long side is much longer: ``l s^2 + 6 s^2 p`` for p = 1.5 q.
- A matrix that is given as a product is decomposed by its factors (``factored.py``), all of its directions at once.

What is left out is never estimated: it is the energy of the matrix less the energy of its projection, so that
reconstruction errors stay exact whichever way was taken. Cut at ranks up to q the range finder's are within 1.4 % of the
least possible where singular values fall as i^-0.3; where they fall as 1/i and q is 200 of 768, within 16 %. Singular vectors are made unique in sign (the entry of largest size in each vector is positive), so
that results do not depend on the driver or on the order in which tasks arrive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .eigen import eigen_of
from .factored import product_svd
from .factors import LowRankFactors, Matrix, Spectrum, energy_of
from .krylov import Search

#: Gram matrices up to this side are formed and solved in float64.
DOUBLE_SIDE = 384
#: The range finder is for matrices whose short side is at least this.
SKETCH_SIDE = 256
#: Through ``a^T a`` by two products with the matrix, and through its Gram matrix, where products cost less.
DIRECT, WITHIN_GRAM = Search(1.9, blocks=4, times=1), Search(1.5, blocks=3, times=2)
#: Gram matrices are formed in so many strips, each from its diagonal block on; on an accelerator whole, by one operation.
STRIPS = 8
#: What an eigenproblem of size s costs, in multiples of s^3 operations of a matrix product, by type of device.
EIGEN_COST = {"cpu": 9.0, "cuda": 60.0}
#: What the range finder's thin products and orthogonalisations take beyond their operations, against square products.
THIN = 1.6


@dataclass(frozen=True)
class HalfSVD:
    """Half a singular value decomposition: all that is needed, beside the matrix itself, to cut it to any rank.

    Args:
        vectors: (s, q) leading singular vectors of the short side; fewer where the matrix is of lower rank.
        S: (q,) singular values, descending.
        tail_energy: squared Frobenius norm of what the q directions leave out.
    """

    vectors: Tensor
    S: Tensor
    tail_energy: float

    def factors(self, matrix: Matrix, rank: int) -> LowRankFactors:
        """The matrix projected on its leading ``rank`` directions, split evenly as in Eq. 14's start.

        Args:
            matrix: (m, n) the one that was decomposed.
        """
        vectors = self.vectors[:, :rank].to(matrix.device, matrix.dtype)  # (s, r)
        tall = matrix.shape[0] >= matrix.shape[1]
        scaled = matrix @ vectors if tall else vectors.mT @ matrix
        root = torch.linalg.vector_norm(scaled, dim=0 if tall else 1)  # (r,)
        root = root.clamp(min=torch.finfo(matrix.dtype).tiny).sqrt()
        short = vectors * root
        if tall:
            return LowRankFactors(scaled.div_(root), short.mT)
        return LowRankFactors(short, scaled.div_(root[:, None]))


def half_svd(
    matrix: Matrix,
    *,
    max_rank: int | None = None,
    exact: bool = False,
    name: str = "",
) -> HalfSVD:
    """The leading singular values and short-side vectors of a matrix, Eq. 7.

    Args:
        matrix: (m, n), finite.
        max_rank: directions to find; all ``min(m, n)`` if None.
        exact: never by the range finder.
        name: used in log lines only.

    Raises:
        torch.linalg.LinAlgError: if neither the eigensolver nor its float64 fall-back converges.
    """
    q, side = _count(matrix, max_rank), min(matrix.shape)
    if isinstance(matrix, LowRankFactors):
        return _half_of_product(matrix, q)
    work = matrix.to(torch.float32)
    a = _tall(work)
    if q == 0:
        return HalfSVD(a.new_zeros(side, 0), a.new_zeros(0), float(energy_of(work)))
    way = _gram if exact else _cheapest(a.shape, q, a.device.type)
    vectors, S = way(a, q, name)
    tail = 0.0
    if q < side:
        tail = float(energy_of(work)) - float(S.double().square().sum())
    return HalfSVD(vectors * _sign(vectors), S, max(tail, 0.0))


def spectrum(
    matrix: Matrix,
    *,
    max_rank: int | None = None,
    exact: bool = False,
    name: str = "",
) -> Spectrum:
    """Singular value decomposition, Eq. 4 and 7, cut to ``max_rank`` directions.

    What is cut off is carried as ``tail_energy``, so that reconstruction errors stay exact. Arguments and errors are as of
    :func:`half_svd`.
    """
    if isinstance(matrix, LowRankFactors):
        return _whole_of_product(matrix, _count(matrix, max_rank))
    found = half_svd(matrix, max_rank=max_rank, exact=exact, name=name)
    work = matrix.to(torch.float32)
    a, tall = _tall(work), work.shape[0] >= work.shape[1]
    # Directions of (nearly) no energy have no long side; QR makes one up that is orthogonal to the rest.
    exact = found.vectors.double() if a.shape[1] <= DOUBLE_SIDE else found.vectors
    long, r = torch.linalg.qr(a.to(exact.dtype) @ exact)
    diagonal = r.diagonal()
    long = (long * torch.where(diagonal < 0, -1.0, 1.0).to(long)).to(work.dtype)
    U, V = (long, found.vectors) if tall else (found.vectors, long)
    sign = _sign(U)
    return Spectrum(U * sign, found.S, (V * sign).mT, found.tail_energy)


def singular_values(matrix: Matrix, *, max_rank: int | None = None) -> Tensor:
    """The (q,) leading singular values, descending, without vectors where that is cheaper."""
    if isinstance(matrix, LowRankFactors):
        return half_svd(matrix, max_rank=max_rank).S
    a, q = _tall(matrix.to(torch.float32)), _count(matrix, max_rank)
    way = _cheapest(a.shape, q, a.device.type)
    if way is not _gram:
        return way(a, q, "")[1]
    values = torch.linalg.eigvalsh(_gram_matrix(a)).flip(-1)[:q]
    return values.clamp(min=0).sqrt().to(a.dtype)


def sketched(shape: Sequence[int], rank: int, *, device: str = "cpu") -> bool:
    """Whether a range finder is the cheaper way to ``rank`` directions of an (m, n) matrix on a type of device."""
    return _cheapest(shape, rank, device) is not _gram


def _count(matrix: Matrix, max_rank: int | None) -> int:
    """q."""
    side = min(matrix.shape)
    return side if max_rank is None else min(max_rank, side)


def _tall(matrix: Tensor) -> Tensor:
    """(l, s)."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


#: (l, s) matrix, q and name -> (s, q) vectors and (q,) values.
_Way = Callable[[Tensor, int, str], tuple[Tensor, Tensor]]


def _cheapest(shape: Sequence[int], rank: int, device: str) -> _Way:
    if min(shape) < SKETCH_SIDE:
        return _gram
    costs = _operations(shape, rank, device)
    thin = {_gram: 1.0, _within_gram: THIN, _direct: THIN}
    return min(costs, key=lambda way: costs[way][0] + thin[way] * costs[way][1])


def _operations(
    shape: Sequence[int], rank: int, device: str
) -> dict[_Way, tuple[float, float]]:
    """By way: operations to form the Gram matrix, if it is, and those that follow."""
    side, long = sorted(shape)
    eigen = EIGEN_COST.get(device, EIGEN_COST["cuda"])
    gram = long * side**2 * (1 + 1 / STRIPS)

    def search(how: Search, rows: int) -> float:
        p = how.directions(rank, side)
        return 6 * rows * side * p + 4 * side * p**2 + eigen * p**3

    return {
        _gram: (gram, eigen * side**3),
        _within_gram: (gram, search(WITHIN_GRAM, side)),
        _direct: (0.0, search(DIRECT, long)),
    }


def _gram_matrix(a: Tensor) -> Tensor:
    """``a^T a`` of (l, s); on a CPU each entry off the diagonal blocks is formed once."""
    work = a.double() if a.shape[1] <= DOUBLE_SIDE else a
    if work.device.type != "cpu":
        return work.mT @ work
    side = work.shape[1]
    gram, width = work.new_empty(side, side), max(-(-side // STRIPS), 1)
    for begin in range(0, side, width):
        end = begin + width
        strip = work[:, begin:end].mT @ work[:, begin:]
        gram[begin:end, begin:] = strip
        gram[end:, begin:end] = strip[:, width:].mT
    return gram


def _gram(a: Tensor, q: int, name: str) -> tuple[Tensor, Tensor]:
    """By all eigenvectors of the Gram matrix of the columns of ``a``."""
    vectors, S = _leading_of(_gram_matrix(a), q, name)
    return vectors.to(a.dtype).contiguous(), S.to(a.dtype)


def _within_gram(a: Tensor, q: int, name: str) -> tuple[Tensor, Tensor]:
    """As :func:`_gram`, within the block Krylov space of the Gram matrix.

    Two products with it in a row are of fourth powers, which float32 holds of singular values near 1: it is scaled by a
    power of two, which rounds nothing.
    """
    gram = _gram_matrix(a)
    half = torch.frexp(gram.diagonal().max()).exponent // 2
    gram = torch.ldexp(gram, -2 * half).to(a.dtype)
    rows = WITHIN_GRAM.space(lambda x: gram @ x, q, a)  # (s, p)
    vectors, S = _leading_of(rows.mT @ (gram @ rows), q, name)
    return rows @ vectors, torch.ldexp(S, half)


def _direct(a: Tensor, q: int, name: str) -> tuple[Tensor, Tensor]:
    """As :func:`_within_gram`, by products with the matrix itself."""
    rows = DIRECT.space(lambda x: a.mT @ (a @ x), q, a)  # (s, p)
    inside = a @ rows  # (l, p)
    vectors, S = _leading_of(inside.mT @ inside, q, name)
    return rows @ vectors, S


def _leading_of(gram: Tensor, q: int, name: str) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors (s, q) of a Gram matrix, and (q,) roots of its eigenvalues."""
    values, vectors = eigen_of(gram, name)  # ascending
    return vectors.flip(-1)[:, :q], values.flip(-1)[:q].clamp(min=0).sqrt()


def _half_of_product(matrix: LowRankFactors, q: int) -> HalfSVD:
    """:func:`half_svd` of a product: beyond its rank there are no vectors, and zeros for singular values."""
    U, S, V = product_svd(matrix)
    vectors = (V if matrix.shape[0] >= matrix.shape[1] else U)[:, :q].to(matrix.dtype)
    values, tail = _padded(S[:q].to(matrix.dtype), q), float(S[q:].square().sum())
    return HalfSVD(vectors * _sign(vectors), values, tail)


def _whole_of_product(matrix: LowRankFactors, q: int) -> Spectrum:
    """:func:`spectrum` of a product: beyond its rank singular values and vectors are zero."""
    U, S, V = product_svd(matrix)
    sign = _sign(U[:, :q])
    U, V = U[:, :q] * sign, V[:, :q] * sign
    parts = [_padded(part.to(matrix.dtype), q) for part in (U, S[:q], V)]
    return Spectrum(parts[0], parts[1], parts[2].mT, float(S[q:].square().sum()))


def _padded(x: Tensor, size: int) -> Tensor:
    """Zeros up to the given size of the last side."""
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _sign(vectors: Tensor) -> Tensor:
    """(q,) by which the entry of largest size in each vector becomes positive."""
    if vectors.numel() == 0:
        return vectors.new_ones(vectors.shape[1])
    pivot = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(pivot < 0, -1.0, 1.0).to(vectors)
