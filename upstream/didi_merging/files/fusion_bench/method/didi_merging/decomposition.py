"""
One matrix of T models as a shared part and residuals (Eq. 2-6 of the paper).

Letters: `m` out, `n` in, `T` tasks, `q` singular values kept; `tau_t` task vectors, `S` their
mean, `E_t = tau_t - S` the experts.
"""

from dataclasses import dataclass
from typing import NamedTuple, Tuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Factors(NamedTuple):
    """A product `up @ down`."""

    up: Tensor  # (m, r)
    down: Tensor  # (r, n)

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def dense(self) -> Tensor:
        return self.up @ self.down


@dataclass(frozen=True)
class Spectrum:
    """The leading part of a singular value decomposition, and how much it leaves out."""

    left: Tensor  # (m, q)
    sigma: Tensor  # (q,)
    right: Tensor  # (n, q)
    tail_energy: float

    def cut(self, matrix: Tensor, rank: int) -> Factors:
        """The matrix on its leading directions, each split evenly over both factors (Eq. 5)."""
        tall = matrix.shape[0] >= matrix.shape[1]
        short = (self.right if tall else self.left)[:, :rank]
        long = matrix @ short if tall else short.mT @ matrix
        root = torch.linalg.vector_norm(long, dim=0 if tall else 1)
        root = root.clamp(min=torch.finfo(matrix.dtype).tiny).sqrt()
        if tall:
            return Factors(long / root, (short * root).mT)
        return Factors(short * root, long / root[:, None])


def spectrum(matrix: Tensor, size: int) -> Spectrum:
    """
    The leading `size` singular directions (Eq. 4), by the Gram matrix of the short side in
    float64: exact to float32, and many times faster than an SVD of a large matrix.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    a = matrix.double() if tall else matrix.double().mT  # (long, short)
    values, vectors = torch.linalg.eigh(a.mT @ a)  # ascending
    short = vectors.flip(-1)[:, :size]
    sigma = values.flip(-1)[:size].clamp(min=0).sqrt()
    long = normalize(a @ short, dim=0)
    energy = a.square().sum()
    tail = float(energy - sigma.square().sum()) if size < a.shape[1] else 0.0
    left, right = (long, short) if tall else (short, long)
    left, sigma, right = (x.to(matrix.dtype).contiguous() for x in (left, sigma, right))
    return Spectrum(left, sigma, right, max(tail, 0.0))


class Coupling(NamedTuple):
    """
    Inner products between the directions of `S` and those of each `E_t`, by which the error
    of truncating both is known exactly; a prime marks what is beyond the kept directions.
    """

    head: Tensor  # (T, q, q)   (u0_i . ut_j)(v0_i . vt_j)
    shared_tail: Tensor  # (T, q)   u0_i^T E_t' v0_i
    expert_tail: Tensor  # (T, q)   ut_j^T S' vt_j
    tail: Tensor  # (T,)   <S', E_t'>


@dataclass(frozen=True)
class Decomposition:
    """Spectra of the shared matrix and of every expert, and their coupling."""

    shared: Spectrum
    experts: Tuple[Spectrum, ...]
    coupling: Coupling


def decompose(task_vectors: Tensor, size: int) -> Decomposition:
    """
    The spectra of one matrix.

    Args:
        task_vectors: (T, m, n).
        size: Directions to keep of each; what is left out is carried as energy.
    """
    mean = shared_matrix(task_vectors)
    shared = spectrum(mean, size)
    experts = tuple(spectrum(tau - mean, size) for tau in task_vectors)
    parts = [
        _couple(shared, expert, mean, tau - mean)
        for expert, tau in zip(experts, task_vectors)
    ]
    return Decomposition(shared, experts, Coupling(*map(torch.stack, zip(*parts))))


def shared_matrix(task_vectors: Tensor) -> Tensor:
    """The mean of the task vectors (Eq. 2)."""
    total = torch.zeros_like(task_vectors[0])
    for tau in task_vectors:
        total.add_(tau, alpha=1 / len(task_vectors))
    return total


def _couple(
    shared: Spectrum, expert: Spectrum, mean: Tensor, residual: Tensor
) -> Tuple[Tensor, ...]:
    head = (shared.left.mT @ expert.left) * (shared.right.mT @ expert.right)
    on_shared = ((shared.left.mT @ residual) * shared.right.mT).sum(1)
    on_expert = ((expert.left.mT @ mean) * expert.right.mT).sum(1)
    shared_tail = on_shared - head @ expert.sigma
    expert_tail = on_expert - shared.sigma @ head
    tail = (
        (mean * residual).sum()
        - shared.sigma @ head @ expert.sigma
        - shared.sigma @ shared_tail
        - expert_tail @ expert.sigma
    )
    return head, shared_tail, expert_tail, tail
