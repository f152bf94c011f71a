"""What the ways to store one matrix cost, as error and bits at some multiplier ``mu`` (error per bit)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...allocation.experts_curve import ExpertsCurve
from ...allocation.lagrangian import choose
from ..context import Work


def in_all_precisions(
    work: Work, name: str, shared_rank: int, sigma: Tensor, tail_energy: Tensor
) -> list[ExpertsCurve]:
    """Experts of known spectra beside a shared part of some rank, cheapest precision first.

    Args:
        sigma: (T, q).
        tail_energy: (T,) beyond them.
    """
    return [
        ExpertsCurve(
            shared_rank,
            p.rate(*work.shape(name)),
            p.name,
            sigma,
            tail_energy,
            p.rounding,
            p.rounding_dense,
        )
        for p in work.inventory.precisions[name]
    ]


def as_whole(
    work: Work, name: str, energy: Tensor, *, shared: int = 0
) -> list[ExpertsCurve]:
    """Whole experts, or none, of (T,) squared norms, in every precision allowed."""
    nothing = torch.zeros(len(energy), 0)
    return in_all_precisions(work, name, shared, nothing, energy)


def chosen(
    work: Work, options: Mapping[str, Sequence[ExpertsCurve]]
) -> tuple[dict[str, ExpertsCurve], float, float]:
    """The best candidate per matrix, ``mu``, and the error in all."""
    offers = [[c.offer(work.weights[n]) for c in row] for n, row in options.items()]
    picks, mu = choose(offers, work.budget)
    error = sum(row[i].at(mu)[0] for row, i in zip(offers, picks))
    best = {name: row[i] for (name, row), i in zip(options.items(), picks)}
    return best, mu, error


def least(
    work: Work, name: str, candidates: Sequence[ExpertsCurve], mu: float
) -> float:
    """``error + mu * bits`` of the best of them."""
    return min(cost(work, name, candidate, mu) for candidate in candidates)


def cost(work: Work, name: str, candidate: ExpertsCurve, mu: float) -> float:
    """``error + mu * bits`` where that is least."""
    lost, bits = candidate.offer(work.weights[name]).at(mu)
    return lost + mu * bits
