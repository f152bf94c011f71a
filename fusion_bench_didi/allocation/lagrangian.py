"""Choices per matrix that are made together with the ranks: what is shared, how, and in how many bits.

A candidate is one form of a matrix in one precision. *Experts* fix the shared module's rank k_0 and are residuals against the
*truncated* shared part, ``tau_t - S_k0``, so that the error is an exact sum of their lost singular values and no cross
terms remain; *common subspaces* (``common.py``) have two sizes instead of ranks. For a multiplier ``mu`` (error per bit) the
best ranks or sizes of every candidate are known in closed form; the best candidate per matrix follows, and ``mu`` is the
smallest that meets the budget. Experts with ``k_0 = 0`` are always among the candidates, so anything is only shared where it
pays. Letters: ``T`` tasks, ``q`` kept singular values.
"""

from collections.abc import Sequence
from typing import Protocol

import torch


class Curve(Protocol):
    """What one candidate can do for a number of bits."""

    #: error per bit above which it stores nothing
    zero_rate_multiplier: float

    def at(self, mu: float) -> tuple[float, float]:
        """Weighted error and bits where ``error + mu * bits`` is least."""


def choose(options: Sequence[Sequence[Curve]], budget: int) -> tuple[list[int], float]:
    """Index of the best offer per matrix under one budget, and the multiplier ``mu`` at which they are the best.

    Args:
        options: offers per matrix.
        budget: bits.
    """

    def best(row: Sequence[Curve], mu: float) -> tuple[float, int]:
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
    high = max(
        (offer.zero_rate_multiplier for row in options for offer in row), default=0.0
    )
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
