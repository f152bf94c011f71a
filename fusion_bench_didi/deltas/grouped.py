"""Tasks that share something among themselves, and not with the others: of a model that was merged apart from them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..lowrank.factors import LowRankFactors
from .base import Delta, last_of
from .sink import Experts


class GroupedDelta(Delta):
    """A task's change in its group: beside what the group shares, whatever the model shares.

    What is common is held once by all tasks of the group, and counted once.

    Args:
        group: its label.
        common: what the group shares of the tensor, None for nothing.
        own: the task's own, None for nothing.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        group: str,
        common: Delta | None,
        own: Delta | None,
    ):
        super().__init__(shape)
        self.kind, self.group = "grouped", group
        self.common, self.inner = common, own
        self.register_buffer(
            "_place", torch.empty(0, dtype=torch.float32), persistent=False
        )

    def change(self, shared: Delta | None = None) -> Tensor:
        last, below = last_of(self.inner, self.common)
        return self._place.new_zeros(self.shape) if last is None else last.change(below)

    def own(self) -> Tensor:
        return self.change()

    def product(self, shared: Delta | None = None) -> LowRankFactors | None:
        last, below = last_of(self.inner, self.common)
        if last is None:
            return LowRankFactors.zeros(*self.sides, like=self._place)
        return last.product(below)

    def own_product(self) -> LowRankFactors | None:
        return self.product()

    def beyond(self, shared: Delta | None = None) -> Tensor:
        change = self.change()
        return change if shared is None else change - shared.change()

    def beyond_product(self, shared: Delta | None = None) -> LowRankFactors | None:
        own = self.product()
        if own is None or shared is None:
            return own
        other = shared.product()
        return None if other is None else own + other * -1.0

    def tensors(self) -> dict[str, Tensor]:
        """The task's own alone; what is common is the group's."""
        return {} if self.inner is None else self.inner.tensors()

    def options(self) -> dict:
        return {} if self.inner is None else self.inner.options()


def commons(deltas: Iterable[tuple[str, Delta]]) -> dict[tuple[str, str], Delta]:
    """Parts that groups share, by label and tensor name, of experts' deltas by tensor name."""
    return {
        (delta.group, name): delta.common
        for name, delta in deltas
        if isinstance(delta, GroupedDelta) and delta.common is not None
    }


def groups_of(experts: Experts) -> dict[str, dict[str, Any]]:
    """By label the tasks of every group, and the names of the tensors that are theirs; JSON-plain."""
    found: dict[str, dict[str, Any]] = {}
    for task, deltas in experts.items():
        for name, delta in deltas.items():
            if isinstance(delta, GroupedDelta):
                group = found.setdefault(delta.group, {"tasks": {}, "tensors": {}})
                group["tasks"][task] = group["tensors"][name] = None
    return {
        label: {key: list(names) for key, names in group.items()}
        for label, group in found.items()
    }


def apart(
    experts: Experts,
) -> tuple[dict[tuple[str, str], Delta], dict[str, dict[str, Delta]], dict[str, Any]]:
    """Experts taken apart as they are written: what groups share, what tasks have of their own, and :func:`groups_of`."""
    pairs = (pair for deltas in experts.values() for pair in deltas.items())
    own: dict[str, dict[str, Delta]] = {task: {} for task in experts}
    for task, deltas in experts.items():
        for name, delta in deltas.items():
            kept = delta.inner if isinstance(delta, GroupedDelta) else delta
            if kept is not None:
                own[task][name] = kept
    return commons(pairs), own, groups_of(experts)
