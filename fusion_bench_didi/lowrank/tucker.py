"""Common subspaces: what several task vectors share although they are orthogonal to one another.

Task vectors of one matrix often use the same few rows and columns in different combinations. Then

    ``tau_t ~ U C_t V``,   U (m, p) and V (q, n) orthonormal and common to all tasks, C_t (p, q) a task's own core,

which is a Tucker-2 decomposition of the stacked task vectors. It costs ``p m + q n + T p q`` numbers where T experts of rank
r cost ``T r (m + n)``. The start are the leading eigenvectors of ``sum_t w_t tau_t tau_t^T`` and of its mirror image, whose
leading p and q columns are nested, so that one product gives the error at every (p, q); at the sizes chosen, alternating
least squares (De Lathauwer, De Moor and Vandewalle 2000, "HOOI") then lowers it.

Letters: ``m`` out, ``n`` in, ``T`` tasks, ``p`` common columns, ``q`` common rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .factored import JointBasis, all_factored, as_dense
from .factors import Matrix, energy_of
from .svd import HalfSVD, half_svd, singular_values, spectrum

#: The error is tabulated at no more than so many values of p, and of q.
GRID = 256
#: Directions of single tasks among which common ones are looked for, in multiples of the short side.
AMONG = 2


@dataclass(frozen=True)
class TuckerBases:
    """Nested common subspaces of T matrices, and what each pair of sizes keeps.

    Args:
        up: (m, P) leading common columns, orthonormal.
        down: (Q, n) leading common rows, orthonormal.
        sizes_up, sizes_down: values of p and of q, ascending; the last are P and Q.
        kept: (len(sizes_up), len(sizes_down)) weighted energy kept, float64.
        energy: weighted energy in all.
    """

    up: Tensor
    down: Tensor
    sizes_up: Tensor
    sizes_down: Tensor
    kept: Tensor
    energy: float


def tucker_bases(
    task_vectors: Sequence[Matrix],
    weights: Tensor,
    *,
    bases: Sequence[HalfSVD] | None = None,
    max_up: int | None = None,
    max_down: int | None = None,
    name: str = "",
) -> TuckerBases:
    """The start, and the error of every cut of it.

    Args:
        task_vectors: T of (m, n); where all are factored, spaces are looked for in the frame around them.
        weights: (T,) of the squared errors.
        bases: leading directions of each task vector; spaces are looked for among the first of these, :data:`AMONG` times
            the short side in all, and the energy beyond them counts as spread evenly, which is faster. All
            directions, and exactly, if None.
        max_up, max_down: P and Q; whole sides if None.
        name: used in log lines only.
    """
    if all_factored(task_vectors):
        frame = JointBasis.around(task_vectors)
        cores = frame.cores(task_vectors)
        found = tucker_bases(cores, weights, max_up=max_up, max_down=max_down)
        up, down = frame.left @ found.up, found.down @ frame.right.mT
        return replace(found, up=up, down=down)
    scaled = _scaled(task_vectors, weights)
    m, n = scaled.shape[1:]
    P, Q = min(max_up or m, m), min(max_down or n, n)
    energy = float(sum(map(energy_of, scaled)))
    if bases is None:
        up, down = _columns(scaled, P, name), _columns(scaled.mT, Q, name).mT
        if P * n * (m + Q) < Q * m * (n + P):
            inside = (up.mT @ scaled) @ down.mT
        else:
            inside = up.mT @ (scaled @ down.mT)
        squares, rest = inside.square_().sum(0).double(), 0.0  # (P, Q)
    else:
        most = -(-AMONG * min(m, n) // len(bases))
        short = [basis.vectors[:, :most].to(scaled) for basis in bases]  # (s, r)
        long = [(x if m >= n else x.mT) @ v for x, v in zip(scaled, short)]  # (l, r)
        heavy = [v * x.norm(dim=0) for v, x in zip(short, long)]
        up = _columns(long if m >= n else heavy, P, name)
        down = _columns(heavy if m >= n else long, Q, name).mT
        left, right = (long, short) if m >= n else (short, long)
        inside = ((up.mT @ a) @ (b.mT @ down.mT) for a, b in zip(left, right))
        squares = sum(core.square_() for core in inside).double()
        rest = energy - float(sum(map(energy_of, long)))
    sizes_up, sizes_down = _grid(up.shape[1]), _grid(down.shape[0])
    kept = squares.cumsum(0)[sizes_up - 1].cumsum(1)[:, sizes_down - 1].cpu()
    kept += max(rest, 0.0) / (m * n) * sizes_up[:, None] * sizes_down
    return TuckerBases(up, down, sizes_up, sizes_down, kept, energy)


def optimistic_tucker(
    shape: tuple[int, int],
    bases: Sequence[HalfSVD],
    weights: Tensor,
    *,
    max_up: int,
    max_down: int,
) -> TuckerBases:
    """At least what :func:`tucker_bases` would find to be kept, by singular values alone; no spaces.

    Common directions of the short side keep no more than the best ones do, and min(p, q) directions of any one task no more
    than its own leading ones.

    Args:
        shape: m and n.
        bases, weights, max_up, max_down: as there.
    """
    (m, n), side = shape, min(shape)
    most = -(-AMONG * side // len(bases))
    heavy, own, energy = [], torch.zeros(side + 1, dtype=torch.float64), 0.0
    for basis, weight in zip(bases, weights.tolist()):
        values = basis.S[:most][: basis.vectors.shape[1]]
        heavy.append(weight**0.5 * basis.vectors[:, : len(values)] * values)
        squares = weight * basis.S.double().square().cpu()
        own[1 : len(values) + 1] += squares[: len(values)]
        energy += float(squares.sum()) + weight * basis.tail_energy
    together = torch.zeros_like(own)
    values = singular_values(torch.cat(heavy, 1)).double().cpu()
    together[1 : len(values) + 1] = values.square()
    own, together = own.cumsum(0), together.cumsum(0)
    sizes_up, sizes_down = _grid(min(max_up, m)), _grid(min(max_down, n))
    p, q = torch.broadcast_tensors(sizes_up[:, None], sizes_down)
    short, rank = (p if m < n else q), torch.minimum(p, q)
    kept = torch.minimum(together[short], own[rank])
    kept += max(energy - float(own[-1]), 0.0) / (m * n) * p * q
    like = bases[0].vectors
    up, down = like.new_empty(m, 0), like.new_empty(0, n)
    return TuckerBases(up, down, sizes_up, sizes_down, kept, energy)


def refine_tucker(
    task_vectors: Sequence[Matrix],
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    sweeps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Alternating least squares at fixed sizes: each side is the best for the other, so the error never rises.

    Args:
        task_vectors: T of (m, n).
        weights: (T,).
        up: (m, p), orthonormal columns.
        down: (q, n), orthonormal rows.
        sweeps: at most so many.
        tolerance: stop when a sweep lowers the error by less than this part of it.

    Returns:
        (m, p) and (q, n).
    """
    if all_factored(task_vectors):
        frame = JointBasis.around(task_vectors)
        up, down = refine_tucker(
            frame.cores(task_vectors),
            weights,
            frame.left.mT @ up,
            down @ frame.right,
            sweeps=sweeps,
            tolerance=tolerance,
        )
        return frame.left @ up, down @ frame.right.mT
    scaled = _scaled(task_vectors, weights)
    energy = float(sum(map(energy_of, scaled)))

    def left_out(up: Tensor, down: Tensor) -> float:
        return energy - float((up.mT @ scaled @ down.mT).double().square().sum())

    before = left_out(up, down)
    for _ in range(sweeps):
        new_up, new_down = up, down
        if up.shape[1] < up.shape[0]:
            new_up = _columns(scaled @ down.mT, up.shape[1])
        if down.shape[0] < down.shape[1]:
            new_down = _columns(scaled.mT @ new_up, down.shape[0]).mT
        error = left_out(new_up, new_down)
        if error >= before:  # rounding has the last word
            break
        up, down = new_up, new_down
        if before - error <= tolerance * before:
            break
        before = error
    return up, down


def cores(task_vectors: Sequence[Matrix], up: Tensor, down: Tensor) -> Tensor:
    """(T, p, q) that serve bases best which need not be orthonormal, such as rounded ones.

    Args:
        task_vectors: T of (m, n).
        up: (m, p).
        down: (q, n).
    """
    left, right = torch.linalg.pinv(up), torch.linalg.pinv(down)
    return torch.stack([left @ tau @ right for tau in task_vectors])


def _scaled(task_vectors: Sequence[Matrix], weights: Tensor) -> Tensor:
    """(T, m, n) by the roots of their weights."""
    if not isinstance(task_vectors, Tensor):
        task_vectors = torch.stack([as_dense(tau) for tau in task_vectors])
    return task_vectors * weights.to(task_vectors).sqrt()[:, None, None]


def _columns(matrices: Sequence[Tensor], count: int, name: str = "") -> Tensor:
    """(m, count) leading left singular vectors of matrices (m, n_t) side by side."""
    side_by_side = torch.cat(tuple(matrices), 1)
    # the short side's; of a square one the right ones
    if side_by_side.shape[0] < side_by_side.shape[1]:
        return half_svd(side_by_side, max_rank=count, name=name).vectors
    return spectrum(side_by_side, max_rank=count, name=name).U


def _grid(size: int) -> Tensor:
    """At most GRID + 1 whole numbers up to ``size``, which is the last."""
    step = -(-size // GRID)
    return torch.tensor([*range(step, size, step), size])
