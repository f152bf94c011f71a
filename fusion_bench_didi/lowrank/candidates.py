"""Choices per matrix that are made together with the ranks: what is shared, how, and in how many bits.

A candidate is one form of a matrix in one precision. *Experts* fix the shared module's rank k_0 and are residuals against the
*truncated* shared part, ``tau_t - S_k0``, so that the error is an exact sum of their lost singular values and no cross
terms remain; *common subspaces* (``common.py``) have two sizes instead of ranks. For a multiplier ``mu`` (error per bit) the
best ranks or sizes of every candidate are known in closed form; the best candidate per matrix follows, and ``mu`` is the
smallest that meets the budget. Experts with ``k_0 = 0`` are always among the candidates, so anything is only shared where it
pays. Letters: ``T`` tasks, ``q`` kept singular values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .allocation import MatrixSpectra, Price, fill, total_cost


class Offer(Protocol):
    """What one candidate can do for a number of bits."""

    #: error per bit above which it stores nothing
    steepest: float

    def at(self, mu: float) -> tuple[float, float]:
        """Weighted error and bits where ``error + mu * bits`` is least."""


@dataclass(frozen=True)
class Candidate:
    """One way to store a matrix as experts on a shared module.

    Args:
        shared_rank: k_0.
        price: of its precision.
        precision: name of the precision.
        sigma: (T, q) singular values of the residuals.
        tail_energy: (T,) beyond them.
        rounding, rounding_dense: relative squared error that rounding adds to what is kept as factors, and whole.
    """

    shared_rank: int
    price: Price
    precision: str
    sigma: Tensor
    tail_energy: Tensor
    rounding: float = 0.0
    rounding_dense: float = 0.0

    def curve(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted error (T, K) and bits (K,) of an expert at ranks 0, 1, ..., cap and, last, dense."""
        energy = self.sigma.double().square()
        whole = energy.sum(1) + self.tail_energy.double()
        cap = min((self.price.dense - 1) // self.price.per_rank, energy.shape[1])
        # summed from the end, so that nothing is left where nothing is
        left = energy.flip(1).cumsum(1).flip(1)
        left = torch.cat([left, energy.new_zeros(len(energy), 1)], 1)[:, : cap + 1]
        left = left + self.tail_energy.double()[:, None]
        error = left + self.rounding * (whole[:, None] - left)
        error = torch.cat([error, self.rounding_dense * whole[:, None]], 1)
        bits = torch.arange(cap + 2, dtype=torch.float64) * self.price.per_rank
        bits[-1] = self.price.dense
        return weights.double()[:, None] * error, bits

    def ranks(self, weights: Tensor, mu: float, full: int) -> Tensor:
        """(T,) of the experts where ``error + mu * bits`` is least; ``full`` where they are whole.

        Args:
            weights: (T,).
        """
        error, bits = self.curve(weights)
        best = (error + mu * bits).argmin(1)
        return torch.where(best == len(bits) - 1, full, best)

    def offer(self, weights: Tensor) -> Offer:
        """
        Args:
            weights: (T,).
        """
        shared = min(self.shared_rank * self.price.per_rank, self.price.dense)
        return _Experts(*self.curve(weights), shared)


@dataclass(frozen=True)
class _Experts:
    """Error (T, K) and bits (K,) of each expert, and the bits of the shared module."""

    error: Tensor
    bits: Tensor
    shared: int

    @property
    def steepest(self) -> float:
        return float((self.error[:, :1] / self.bits[1]).max())

    def at(self, mu: float) -> tuple[float, float]:
        ranks = (self.error + mu * self.bits).argmin(1)  # (T,)
        lost = float(self.error.gather(1, ranks[:, None]).sum())
        return lost, float(self.bits[ranks].sum()) + self.shared


def choose(options: Sequence[Sequence[Offer]], budget: int) -> tuple[list[int], float]:
    """Index of the best offer per matrix under one budget, and the multiplier ``mu`` at which they are the best.

    Args:
        options: offers per matrix.
        budget: bits.
    """

    def best(row: Sequence[Offer], mu: float) -> tuple[float, int]:
        """Bits and index."""
        found = (torch.inf, 0.0, 0)
        for index, offer in enumerate(row):
            lost, bits = offer.at(mu)
            found = min(found, (lost + mu * bits, bits, index))
        return found[1:]

    def spent(chosen: Sequence[tuple[float, int]]) -> float:
        return sum(bits for bits, _ in chosen)

    generous = [best(row, 0.0) for row in options]
    if spent(generous) <= budget:
        return [index for _, index in generous], 0.0
    high = max((offer.steepest for row in options for offer in row), default=0.0)
    high = max(high, 1e-300)
    low = high * 2.0**-60
    frugal = [best(row, high) for row in options]
    for _ in range(40):  # bisection on the logarithm
        middle = (low * high) ** 0.5
        # bits never rise with mu: what is the same at both ends is the same between them
        chosen = [
            f if f == g else best(row, middle)
            for row, f, g in zip(options, frugal, generous)
        ]
        if spent(chosen) <= budget:
            high, frugal = middle, chosen
        else:
            low, generous = middle, chosen
    return [index for _, index in frugal], high


def upgrade(
    table: Sequence[MatrixSpectra],
    ranks: Sequence[Tensor],
    ladders: Sequence[Sequence[tuple[Price, float]]],
    budget: int,
) -> tuple[list[MatrixSpectra], list[Tensor]]:
    """Spend what the ranks could not: finer precision, matrix by matrix, where it gains most per bit.

    Ranks run out where the budget is generous: every module of the chosen precisions is then complete.

    Args:
        ladders: per matrix the precisions, cheapest first, as (price, relative rounding error).

    Returns:
        the rows at their new prices, and the ranks, filled again.
    """
    rows, ranks = list(table), fill(table, ranks, budget)
    while True:
        left = budget - total_cost(rows, ranks)
        best = (0.0, -1, rows[0].price)
        for i, (row, k, ladder) in enumerate(zip(rows, ranks, ladders)):
            prices = [price for price, _ in ladder]
            level = prices.index(row.price)
            if level + 1 == len(ladder):
                continue
            finer = replace(row, price=prices[level + 1])
            extra = finer.cost(k) - row.cost(k)
            if not 0 < extra <= left:
                continue
            energy = row.sigma.double().square().sum(1) + row.tail_energy
            kept = float((row.module_weights * energy * (k > 0))[1:].sum())
            gain = (ladder[level][1] - ladder[level + 1][1]) * kept / extra
            best = max(best, (gain, i, finer.price), key=lambda entry: entry[0])
        gain, i, price = best
        if gain <= 0:
            return rows, ranks
        rows[i] = replace(rows[i], price=price)
        ranks = fill(rows, ranks, budget)


def sharing(mean: Tensor, sigma: Tensor, weights: Tensor, rank: int) -> float:
    """How much more the ``rank`` leading directions of the mean hold than those of the average task, per stored number.

    ``(sum_t w_t) sum_i s_i^2 / mean_t(w_t sum_i sigma_ti^2)``: about 1 for unrelated tasks, where sharing is no gain, and T
    for equal ones.

    Args:
        mean: (q,) singular values of the weighted mean.
        sigma: (T, q) of the task vectors.
        weights: (T,).
    """
    own = (weights[:, None] * sigma[:, :rank].square()).sum(1).mean()
    return float(weights.sum() * mean[:rank].square().sum() / own.clamp(min=1e-300))
