"""Ranks under one budget by reverse water-filling on convex hulls, uniform ranks, and the greedy end of every allocation.

Modules and their rates are those of ``spectra.py``. Letters: ``T`` tasks, ``q`` kept singular values, ``k`` rank.
"""

import heapq
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .spectra import MatrixSpectra, left_out, total_cost

#: Who gets how much rank: ``greedy`` water-filling, ``uniform`` shares, or ranks ``learned`` through a smooth truncation (Eq. 7-13).
Allocation = Literal["learned", "greedy", "uniform"]


def greedy(table: Sequence[MatrixSpectra], budget: int) -> list[Tensor]:
    """Water-filling on the singular values: the optimum of the truncation error without cross terms.

    Component i of an expert is worth ``w_t sigma_i^2`` per ``per_rank`` bits, of the shared module
    ``sum_t w_t sigma_i^2``; the dense form enters as the last edge of each module's lower convex hull.

    Returns:
        one (T + 1,) integer tensor per matrix.
    """
    if not table:
        return []
    steps = [_hull_steps(index, row) for index, row in enumerate(table)]
    edges = [torch.cat(of_all) for of_all in zip(*steps)]
    slope, module, matrix, target, cost = (x[edges[0] > 0] for x in edges)
    ranks = [_snap(row, torch.zeros(row.sigma.shape[0])) for row in table]
    order = torch.sort(slope, descending=True, stable=True).indices
    left = budget - total_cost(table, ranks)
    taken = order[torch.cumsum(cost[order], 0) <= left]
    for i, j, k in zip(
        matrix[taken].tolist(), module[taken].tolist(), target[taken].tolist()
    ):
        ranks[i][j] = max(int(ranks[i][j]), k)
    return fill(table, ranks, budget)


def _hull_steps(index: int, row: MatrixSpectra) -> tuple[Tensor, ...]:
    """Gain per bit, module, matrix, rank reached and bits of every edge of the convex error-cost curves, module by module."""
    free, per_rank = slice(row.free.start, row.free.stop), row.rate.per_rank
    if row.rate.most is None:
        last, jump = (edge[free] for edge in dense_from(row))
    else:
        last = torch.full((len(row.free),), row.cap)
        jump = torch.zeros(len(last))
    energy = row.sigma[free, : int(last.max())].double().square()  # (modules, ranks)
    ranks = torch.arange(1, energy.shape[1] + 1)
    gain = torch.cat([energy / per_rank, jump[:, None]], 1)
    reached = torch.cat([ranks, torch.tensor([row.full])]).expand(gain.shape)
    bits = torch.full_like(reached, per_rank)
    bits[:, -1] = row.rate.dense - last * per_rank
    module = torch.arange(free.start, free.stop)[:, None].expand(gain.shape)
    known = (ranks <= last[:, None], torch.ones(len(last), 1, dtype=torch.bool))
    there = torch.cat(known, 1)
    slope = row.module_weights[free, None].double() * gain
    out = (slope, module, torch.full_like(module, index), reached, bits)
    return tuple(edges[there] for edges in out)


def dense_from(row: MatrixSpectra) -> tuple[Tensor, Tensor]:
    """(T + 1,) the rank from which the dense form is the next edge of the hull, and its gain per bit, unweighted, in float32."""
    left = left_out(row.sigma, row.tail_energy, row.cap)
    jump = left / (row.rate.dense - torch.arange(row.cap + 1) * row.rate.per_rank)
    rank = jump.argmin(1)
    return rank, jump.gather(1, rank[:, None])[:, 0].float()


def uniform(table: Sequence[MatrixSpectra], budget: int) -> list[Tensor]:
    """Every module of every matrix at the same compression ratio k (m + n) / (m n), Eq. 12."""
    shares = []
    for row in table:
        m, n = row.shape
        shares.append(torch.full((row.sigma.shape[0],), m * n / (m + n)))
    return scale_to_budget(table, shares, budget)


def scale_to_budget(
    table: Sequence[MatrixSpectra], continuous: Sequence[Tensor], budget: int
) -> list[Tensor]:
    """One global factor on continuous ranks (T + 1,) per matrix, rounded, as large as the budget allows; the rest is filled greedily."""

    def rounded(factor: float) -> list[Tensor]:
        return [
            _snap(row, torch.floor(k * factor + 0.5))
            for row, k in zip(table, continuous)
        ]

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


def _snap(row: MatrixSpectra, ranks: Tensor) -> Tensor:
    """Never more than a module needs; past the cap ranks become full (stored dense); a fixed shared rank stays."""
    ranks = torch.minimum(ranks.clamp(min=0).long(), row.needed)
    ranks = torch.where(ranks > row.cap, torch.full_like(ranks, row.full), ranks)
    if row.shared_rank is not None:
        ranks[0] = row.shared_rank
    return ranks


def fill(
    table: Sequence[MatrixSpectra], ranks: Sequence[Tensor], budget: int
) -> list[Tensor]:
    """Spend what is left on the single steps worth most per bit, until none that helps fits.

    Raises:
        ValueError: if ``ranks`` already cost more than the budget.
    """
    ranks = [k.clone() for k in ranks]
    left = budget - total_cost(table, ranks)
    if left < 0:
        raise ValueError(f"the ranks given exceed the budget by {-left} bits.")
    heap: list[tuple[float, int, int]] = []

    def push(i: int, j: int) -> None:
        gain, bits, _ = _next_step(table[i], j, int(ranks[i][j]))
        if gain > 0 and bits <= left:
            heapq.heappush(heap, (-gain / bits, i, j))

    for i, row in enumerate(table):
        for j in row.free:
            push(i, j)
    while heap:
        _, i, j = heapq.heappop(heap)
        _, bits, target = _next_step(table[i], j, int(ranks[i][j]))
        if bits > left:
            continue
        ranks[i][j] = target
        left -= bits
        push(i, j)
    return ranks


def _next_step(row: MatrixSpectra, j: int, k: int) -> tuple[float, int, int]:
    """Gain, bits and rank of the next larger form of module j; gain 0 if there is none or nothing is missing."""
    limited = row.rate.most is not None
    if k >= (row.cap if limited else row.full):
        return 0.0, 1, k
    weight = float(row.module_weights[j])
    if k < row.cap:
        return weight * float(row.sigma[j, k]) ** 2, row.rate.per_rank, k + 1
    missing = float(row.sigma[j, k:].double().square().sum() + row.tail_energy[j])
    bits = max(row.rate.dense - k * row.rate.per_rank, 1)
    return weight * missing, bits, row.full
