"""Cores in common bases that stand already: how a task that is added to a finished model uses what the others share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...allocation.curves import PerTaskCurve
from ...deltas.sink import EncodedTensor
from ...deltas.tucker import Bases
from ...lowrank.factored import as_dense
from ...lowrank.factors import energy_of
from ...lowrank.tucker import cores
from ..context import MergeContext
from ..reconstruction import squared_error
from .base import Choice, Decision, Look


class GivenBases:
    """Cores of the sizes that the bases have, or nothing, task by task."""

    name = "given_bases"

    def choices(self, look: Look) -> Iterator[Choice]:
        context, given = look.context, look.context.given
        bases = None if given is None else given.bases.get(look.name)
        if bases is None or not look.tensor.stackable:
            return
        up, down = _sides(bases)
        vectors = [as_dense(tau).cpu() for tau in look.matrices]
        fitted = cores(vectors, up, down)  # (T, p, q)
        rest = [tau - up @ core @ down for tau, core in zip(vectors, fitted)]
        energy, lost = look.energy.cpu(), torch.stack([*map(energy_of, rest)])
        weights = look.weights.cpu().double()[:, None]
        for precision in context.inventory.precisions[look.name]:
            bits = precision.core_bits(*fitted.shape[1:])
            stored = lost + precision.rounding_dense * (energy - lost).clamp(min=0)
            error = weights * torch.stack([energy, stored], 1)
            curve = PerTaskCurve(error, torch.tensor([0.0, bits], dtype=torch.float64))
            yield Choice(self, precision, curve)

    def encode(self, context: MergeContext, decision: Decision) -> EncodedTensor:
        name, bases = decision.name, context.given.bases[decision.name]
        tensor, (up, down) = context.tensor(name), _sides(bases)
        experts, errors = [], []
        for tau, kept in zip(tensor.matrices(), decision.point):
            tau, delta = as_dense(tau).cpu(), None
            if kept:
                (core,) = cores([tau], up, down)
                delta = decision.precision.core(tensor.shape, core)
            experts.append(delta)
            errors.append(squared_error(bases, delta, tau))
        return EncodedTensor(name, None, experts, torch.stack(errors))

    def ranks(self, decision: Decision, tasks: int) -> list[int]:
        """1 where there is a core, whose rank is that of its bases."""
        return [0, *decision.point]


def _sides(bases: Bases) -> tuple[Tensor, Tensor]:
    """(m, p) and (q, n), square for whole sides."""
    (m, n), (up, down) = bases.sides, bases.bases()
    up = torch.eye(m) if up is None else up.cpu()
    return up, torch.eye(n) if down is None else down.cpu()


GIVEN_BASES = GivenBases()
