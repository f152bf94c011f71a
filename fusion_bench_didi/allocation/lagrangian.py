"""The Lagrangian choice of a form and a precision per matrix, under one budget (Shoham and Gersho 1988).

For a multiplier (error per bit) every curve has its best point; the curve of least ``error + multiplier * bits`` is the choice of
its matrix, and the multiplier is the smallest that meets the budget.
"""

import math
from collections.abc import Sequence

import torch

from .curves import Curve

#: Halvings of 60 octaves in which the multiplier is looked for, and after how many of them it is interpolated.
HALVINGS, COARSE = 40, 5


def choose(options: Sequence[Sequence[Curve]], budget: int) -> tuple[list[int], float]:
    """Index of the best curve per matrix under one budget, and the multiplier at which they are the best.

    Args:
        options: curves per matrix, one of them of no bits.
        budget: bits.
    """

    def best(row: Sequence[Curve], multiplier: float) -> tuple[float, int]:
        """Bits and index."""
        found = (torch.inf, 0.0, 0)
        for index, curve in enumerate(row):
            lost, bits = curve.at(multiplier)
            found = min(found, (lost + multiplier * bits, bits, index))
        return found[1:]

    def spent(chosen: Sequence[tuple[float, int]]) -> float:
        return sum(bits for bits, _ in chosen)

    generous = [best(row, 0.0) for row in options]
    if spent(generous) <= budget:
        return [index for _, index in generous], 0.0
    high = max(
        (curve.zero_rate_multiplier for row in options for curve in row), default=0.0
    )
    high = max(high, 1e-300)
    frugal = [best(row, high) for row in options]
    while spent(frugal) > budget and high < 1e300:
        high *= 4  # what all tasks share gains more per bit than any expert
        frugal = [best(row, high) for row in options]
    low = high * 2.0**-60
    above, below = low, high  # what is known to take too much, and to fit
    for halving in range(HALVINGS):  # bisection on the logarithm
        middle = (low * high) ** 0.5
        asked = [middle]
        if halving >= COARSE and above < middle < below:
            # bits fall about evenly in between: where they would meet the budget, from both sides
            much, little = spent(generous), spent(frugal)
            part = (much - budget) / (much - little)
            ratio = below / above
            near = min(math.log(ratio), 1 / 2) / 2 * min(part, 1 - part)
            asked = [above * ratio ** (part + by) for by in (-near, near)] + asked
        for one in asked:
            if not above < one < below:
                continue  # bits never rise with the multiplier
            # what is the same at both ends is the same between them
            chosen = [
                f if f == g else best(row, one)
                for row, f, g in zip(options, frugal, generous)
            ]
            if spent(chosen) <= budget:
                below, frugal = one, chosen
            else:
                above, generous = one, chosen
        if middle >= below:
            high = middle
        else:
            low = middle
    return [index for _, index in frugal], high
