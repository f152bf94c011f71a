"""
One rank per module, learned without data under one budget (Eq. 7-13 of the paper).

A *module* is one low-rank product: per matrix the shared one (index 0) and one expert per
task (1..T). A module of rank k takes `k (m + n)` numbers; at full rank it is stored dense, so
ranks between the break-even point and full rank are never used. Letters: `T` tasks, `q`
singular values kept, `k` rank.
"""

import heapq
import math
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from .decomposition import Coupling, Decomposition


@dataclass(frozen=True)
class Modules:
    """
    What the allocation knows of the modules of one matrix.

    Args:
        shape: (m, n).
        bits: Of one number.
        sigma: (T + 1, q) singular values, row 0 those of the shared matrix.
        tail_energy: (T + 1,) energy beyond them.
        coupling: Cross terms of shared part and experts.
    """

    shape: Tuple[int, int]
    bits: int
    sigma: Tensor
    tail_energy: Tensor
    coupling: Coupling

    @classmethod
    def of(cls, parts: Decomposition, shape: Tuple[int, int], bits: int) -> "Modules":
        spectra = (parts.shared, *parts.experts)
        return cls(
            shape,
            bits,
            torch.stack([s.sigma for s in spectra]).cpu(),
            torch.tensor([s.tail_energy for s in spectra]),
            Coupling(*(part.cpu() for part in parts.coupling)),
        )

    @property
    def per_rank(self) -> int:
        return self.bits * sum(self.shape)

    @property
    def dense(self) -> int:
        return self.bits * self.shape[0] * self.shape[1]

    @property
    def full(self) -> int:
        return min(self.shape)

    @property
    def cap(self) -> int:
        """The largest rank that takes less than the dense form, and is known."""
        return min(
            (self.dense - 1) // self.per_rank, self.full - 1, self.sigma.shape[1]
        )

    @property
    def weights(self) -> List[float]:
        """An error of the shared module is an error of every task."""
        tasks = self.sigma.shape[0] - 1
        return [float(tasks)] + [1.0] * tasks

    def cost(self, ranks: Tensor) -> int:
        return sum(
            self.dense if k >= self.full else k * self.per_rank for k in ranks.tolist()
        )

    def snapped(self, ranks: Tensor) -> Tensor:
        """Integer ranks that exist: not above that of the matrix, past the cap full."""
        known = (self.sigma > 0).sum(1)
        needed = torch.where(self.tail_energy > 0, self.full, known)
        ranks = torch.minimum(ranks.clamp(min=0).long(), needed)
        return torch.where(ranks > self.cap, torch.full_like(ranks, self.full), ranks)

    def next_step(self, module: int, rank: int) -> Tuple[float, int, int]:
        """Gain, bits and rank of the next larger form of a module."""
        if rank >= self.full:
            return 0.0, 1, rank
        weight = self.weights[module]
        if rank < self.cap:
            gain = weight * float(self.sigma[module, rank]) ** 2
            return gain, self.per_rank, rank + 1
        missing = self.sigma[module, rank:].double().square().sum()
        missing = float(missing + self.tail_energy[module])
        return weight * missing, max(self.dense - rank * self.per_rank, 1), self.full

    def loss(self, ranks: Tensor, beta: float) -> Tensor:
        """Squared error of all tasks at continuous ranks (T + 1,), Eq. 11."""
        kept = gate(ranks, self.sigma.shape[1], beta)
        return self._error((1 - kept) * self.sigma)

    def energy(self) -> float:
        """The error of storing nothing."""
        return float(self._error(self.sigma))

    def _error(self, lost: Tensor) -> Tensor:
        """The quadratic form of what is lost of the singular values (T + 1, q)."""
        shared, experts, tails = lost[0], lost[1:], self.tail_energy
        head, shared_tail, expert_tail, tail = self.coupling
        error = shared.square().sum() + experts.square().sum(-1) + tails[0] + tails[1:]
        cross = torch.einsum("i,tij,tj->t", shared, head, experts)
        cross = cross + shared_tail @ shared + (experts * expert_tail).sum(-1) + tail
        return (error + 2 * cross).sum()


def gate(ranks: Tensor, size: int, beta: float) -> Tensor:
    """The smooth truncation of Eq. 8: weights (..., size) of singular values at ranks (...)."""
    index = torch.arange(1, size + 1, dtype=ranks.dtype)
    return 0.5 * torch.tanh(beta * (ranks[..., None] - index)) + 0.5


def rank_bound(shape: Tuple[int, int], bits: int, budget: int) -> int:
    """The largest rank of a module that is below break-even and fits into the budget."""
    per_rank, dense = bits * sum(shape), bits * shape[0] * shape[1]
    return max(min((dense - 1) // per_rank, min(shape), budget // per_rank), 1)


def allocate(
    table: Sequence[Modules],
    budget: int,
    *,
    unit: int,
    steps: int = 300,
    lr: float = 0.01,
    beta: Tuple[float, float] = (0.5, 10.0),
    penalty: float = 10.0,
) -> List[Tensor]:
    """
    Learn a continuous rank for every module, then scale all of them to the budget.

    Args:
        table: The modules of every matrix.
        budget: Bits.
        unit: Bits of one model, in which the budget's violation is measured.
        steps: Adam steps.
        lr: In units of a matrix's full rank; decays to zero by a cosine.
        beta: Steepness of the truncation at the first and at the last step.
        penalty: Weight of `|R - R_target|` beside the loss relative to all energy.

    Returns:
        Integer ranks (T + 1,) per matrix.
    """
    if not table:
        return []
    # all modules at the same compression ratio k (m + n) / (m n), Eq. 12
    ranks = scale_to_budget(
        table,
        [torch.full((len(x.sigma),), math.prod(x.shape) / sum(x.shape)) for x in table],
        budget,
    )
    parts = [
        (k / x.full).clamp(0.0, 1.0).requires_grad_(True) for x, k in zip(table, ranks)
    ]
    energy = sum(x.energy() for x in table)
    optimizer = torch.optim.Adam(parts, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        steepness = beta[0] * (beta[1] / beta[0]) ** (step / max(steps - 1, 1))
        optimizer.zero_grad()
        loss, cost = torch.zeros(()), torch.zeros(())
        for x, part in zip(table, parts):
            k = part * x.full
            loss = loss + x.loss(k, steepness)
            cost = cost + (k * x.per_rank).clamp(max=x.dense).sum()
        excess = (cost / unit - budget / unit).abs()
        (loss / energy + penalty * excess).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for part in parts:
                part.clamp_(0.0, 1.0)
    learned = [part.detach() * x.full for x, part in zip(table, parts)]
    return scale_to_budget(table, learned, budget)


def scale_to_budget(
    table: Sequence[Modules], ranks: Sequence[Tensor], budget: int
) -> List[Tensor]:
    """One factor on all ranks, as large as the budget allows; what that leaves is filled."""

    def rounded(factor: float) -> List[Tensor]:
        return [x.snapped(torch.floor(k * factor + 0.5)) for x, k in zip(table, ranks)]

    low, high = 0.0, 1.0
    while total_cost(table, rounded(high)) <= budget and high < 2**20:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        if total_cost(table, rounded(middle)) <= budget:
            low = middle
        else:
            high = middle
    return fill(table, rounded(low), budget)


def fill(
    table: Sequence[Modules], ranks: Sequence[Tensor], budget: int
) -> List[Tensor]:
    """Spend what is left on the single steps worth most per bit, until none fits."""
    ranks = [k.clone() for k in ranks]
    left = budget - total_cost(table, ranks)
    heap: List[Tuple[float, int, int]] = []

    def push(i: int, j: int):
        gain, bits, _ = table[i].next_step(j, int(ranks[i][j]))
        if gain > 0 and bits <= left:
            heapq.heappush(heap, (-gain / bits, i, j))

    for i, k in enumerate(ranks):
        for j in range(len(k)):
            push(i, j)
    while heap:
        _, i, j = heapq.heappop(heap)
        _, bits, rank = table[i].next_step(j, int(ranks[i][j]))
        if bits <= left:
            ranks[i][j] = rank
            left -= bits
            push(i, j)
    return ranks


def total_cost(table: Sequence[Modules], ranks: Sequence[Tensor]) -> int:
    return sum(x.cost(k) for x, k in zip(table, ranks))
