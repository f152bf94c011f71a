"""Experts of known spectra in every precision."""

import torch
from torch import Tensor

from ...allocation.experts_curve import ExpertsCurve
from ...allocation.spectra import Rate
from ...deltas.precision import Precision
from ...lowrank.factors import full_rank
from ..context import MergeContext


def in_all_precisions(
    context: MergeContext,
    name: str,
    sigma: Tensor,
    tail_energy: Tensor,
    *,
    shared_rank: int = 0,
    whole: bool = False,
) -> list[ExpertsCurve]:
    """Experts of known spectra beside a shared part of some rank, cheapest precision first.

    Args:
        sigma: (T, q).
        tail_energy: (T,) beyond them.
        whole: as if any matrix might be stored dense.
    """

    def rate(precision: Precision) -> Rate:
        if whole:
            return precision.rate(*context.sides(name))
        return context.inventory.rate_in(precision, name, shared_rank=shared_rank)

    allowed = context.inventory.precisions[name]
    beyond = context.beyond.get(name) or (0.0,) * len(allowed)
    return [
        ExpertsCurve(
            shared_rank,
            rate(p),
            context.weights[name],
            sigma,
            tail_energy,
            full_rank(*context.sides(name)),
            p.rounding,
            p.rounding_dense + more,
        )
        for p, more in zip(allowed, beyond)
    ]


def as_dense(
    context: MergeContext, name: str, energy: Tensor, *, shared_rank: int = 0
) -> list[ExpertsCurve]:
    """Dense experts, or none, of (T,) squared norms, in every precision allowed."""
    nothing = torch.zeros(len(energy), 0)
    return in_all_precisions(
        context, name, nothing, energy, shared_rank=shared_rank, whole=True
    )
