"""A finished model that tasks are added to: what of it a merge has to count with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..deltas.tucker import Bases


@dataclass(frozen=True)
class Given:
    """A finished model that tasks are added to; task vectors are differences to its base model with the shared part.

    Args:
        unit_bits: one fine-tuned model, of the finished model's account.
        energy: per tensor, (T,) squared norms by which errors are weighed: those of the whole task vectors.
        kept: per tensor, (T,) instead of these: what part of such an energy the vectors to be merged have.
        bases: per matrix, common bases that cores may be written in.
        ranks: per matrix, of the shared part that every task's change holds.
        enough: whether what stands already makes models other than the base model, so that nothing more has to fit.
    """

    unit_bits: int
    energy: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Mapping[str, Bases] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    enough: bool = False

    def weighed(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Energies to weigh errors by: those given, else, also where these are nothing, those found."""
        return {
            name: torch.where(own > 0, own, rest)
            for name, rest in found.items()
            for own in [self.energy.get(name, rest / self.kept.get(name, 1.0))]
        }
