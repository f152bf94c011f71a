"""What a merged model stores beyond its backbone, as the editing operations take and give it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..deltas.base import Delta
from ..deltas.plain import OwnDelta
from ..deltas.storage import StorageReport, account
from ..deltas.tucker import Bases, Core
from ..errors import DiDiError, UnknownTaskError
from ..models.dynamic import DynamicModel
from ..models.saving import parts_of
from ..task_vectors.tower_names import Spelling


@dataclass(frozen=True)
class Stored:
    """A merged model without its backbone: deltas and their account.

    Args:
        shared: by tensor name.
        experts: by task, then tensor name.
        unit_bits, backbone_bits: of the account.
        info: JSON-plain facts that are saved with the model.
        routing_bits: of the router.
        dtype: of the backbone, in which deltas are stored that are not quantized.
    """

    shared: Mapping[str, Delta]
    experts: Mapping[str, Mapping[str, Delta]]
    unit_bits: int
    backbone_bits: int
    info: Mapping[str, Any]
    routing_bits: int = 0
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, model: DynamicModel) -> "Stored":
        """The stored part of a model in memory.

        Raises:
            DiDiError: if it is made of modules in chains, which are no deltas of one task.
        """
        if parts_of(type(model)) != "deltas":
            raise DiDiError(
                f"A {type(model).__name__} cannot be edited, expected a DiDiModel or DynamicModel: one backbone with deltas per "
                "task. Edit what it was made of, and make it again."
            )
        return cls(
            *model._stored,
            model.unit_bits,
            model.backbone_bits,
            model.info,
            0 if model.router is None else model.router.bits,
            next(p.dtype for p in model.backbone.parameters() if p.is_floating_point()),
        )

    @property
    def tasks(self) -> list[str]:
        return list(self.experts)

    @property
    def storage(self) -> StorageReport:
        return account(
            self.shared,
            self.experts,
            unit_bits=self.unit_bits,
            backbone_bits=self.backbone_bits,
            routing_bits=self.routing_bits,
        )

    @property
    def touched(self) -> set[str]:
        """Names of the tensors that are changed."""
        return set().union(self.shared, *self.experts.values())

    def spelled(self, spell: Spelling) -> "Stored":
        """The same for tensors of other names."""
        shared, *own = (
            {spell(name): delta for name, delta in deltas.items()}
            for deltas in (self.shared, *self.experts.values())
        )
        return replace(self, shared=shared, experts=dict(zip(self.experts, own)))

    def useful(self) -> "Stored":
        """Without shared parts that no task uses: bases without cores, and what every task has in its own way."""
        shared = {
            name: delta
            for name, delta in self.shared.items()
            if any(_uses(e.get(name), delta) for e in self.experts.values())
        }
        return replace(self, shared=shared)

    def edited(self, operation: str, **facts: Any) -> "Stored":
        """A copy with a line more in the history of edits."""
        edits = [*self.info.get("edits", ()), {"operation": operation, **facts}]
        return replace(self, info={**self.info, "edits": edits})

    def of_directories(self, *places: Any) -> "Stored":
        """A copy whose last edit is told to be of models that lay there."""
        *edits, last = self.info["edits"]
        last = {**last, "directories": [str(place) for place in places]}
        return replace(self, info={**self.info, "edits": [*edits, last]})


def check_known(
    asked: Iterable[str], there: Iterable[str], place: str | Path, *, most: int = 8
) -> None:
    """Check that tasks are there.

    Args:
        place: that is asked, for the message.
        most: so many of those that are there are named.

    Raises:
        UnknownTaskError: naming those that are not.
    """
    there = list(there)
    if unknown := [task for task in asked if task not in there]:
        left = len(there) - most
        some = f"{there[:most]} and {left} more" if left > 0 else there
        raise UnknownTaskError(f"{place} holds no task {unknown}, only {some}.")


def _uses(own: Delta | None, shared: Delta) -> bool:
    """Whether a task's tensor depends on the shared part."""
    if isinstance(own, OwnDelta):
        return False
    return isinstance(own, Core) or not isinstance(shared, Bases)
