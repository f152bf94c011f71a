"""The unit in which encoded tensors pass from a form to memory, files, account and report."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from ..distributed.ranks import ALONE, Ranks
from .base import Delta

#: Bits of deltas that ranks exchange at once, so that no exchange takes much memory.
BATCH_BITS = 2**30
Item = TypeVar("Item")

Shared = Mapping[str, Delta]
Experts = Mapping[str, Mapping[str, Delta]]


@dataclass(frozen=True)
class EncodedTensor:
    """One tensor of all tasks as it is stored.

    Args:
        name: of the tensor.
        shared: what all tasks use; None for nothing.
        experts: per task (T,), None where nothing is stored.
        errors: (T,) squared norms of what is not reproduced, float64; None where it was not measured.
    """

    name: str
    shared: Delta | None
    experts: Sequence[Delta | None]
    errors: Tensor | None = None

    def cpu(self) -> "EncodedTensor":
        """This tensor's deltas on the CPU, where results are."""
        shared, *experts = (d and d.cpu() for d in (self.shared, *self.experts))
        errors = None if self.errors is None else self.errors.cpu()
        return EncodedTensor(self.name, shared, experts, errors)


class Held(Protocol):
    """A tensor that a sink holds already, with its errors."""

    errors: Tensor | None


class Sink(Protocol):
    """Takes encoded tensors, from any thread, and gives all deltas back."""

    def put(self, tensor: EncodedTensor) -> None:
        """Take one tensor; its experts are those of the sink's tasks, in their order."""

    def recall(self, name: str) -> Held | None:
        """A tensor that the sink holds already, as from an earlier run; None if it has to be encoded now."""

    def close(
        self, order: Sequence[str], ranks: Ranks = ALONE
    ) -> tuple[Shared, Experts]:
        """All deltas that any rank took, shared and by task.

        Args:
            order: of the tensors' names; what comes after a sink goes by it, whoever was faster.
        """


class InMemory:
    """Keeps deltas of tasks, in the order of ``EncodedTensor.experts``; of several ranks each ends with all of them."""

    def __init__(self, tasks: Sequence[str]):
        self._tasks = tuple(tasks)
        self._taken: dict[str, EncodedTensor] = {}

    def put(self, tensor: EncodedTensor) -> None:
        self._taken[tensor.name] = tensor

    def recall(self, name: str) -> Held | None:
        return self._taken.get(name)

    def close(
        self, order: Sequence[str], ranks: Ranks = ALONE
    ) -> tuple[Shared, Experts]:
        taken = self._of_all(ranks)
        shared: dict[str, Delta] = {}
        experts: dict[str, dict[str, Delta]] = {task: {} for task in self._tasks}
        for name in filter(taken.__contains__, order):
            tensor = taken[name]
            if tensor.shared is not None:
                shared[name] = tensor.shared
            for deltas, delta in zip(experts.values(), tensor.experts, strict=True):
                if delta is not None:
                    deltas[name] = delta
        return shared, experts

    def _of_all(self, ranks: Ranks) -> dict[str, EncodedTensor]:
        if ranks.size == 1:
            return self._taken
        batches = batched(self._taken.values(), _bits, BATCH_BITS)
        found = {}
        for turn in range(max(ranks.gather(len(batches)))):
            for some in ranks.gather(batches[turn] if turn < len(batches) else []):
                found.update((tensor.name, tensor) for tensor in some)
        return found


def batched(
    items: Iterable[Item], size: Callable[[Item], int], most: int
) -> list[list[Item]]:
    """Items in order in groups, each full as soon as it is of so much."""
    found: list[list[Item]] = []
    left = 0
    for item in items:
        if left <= 0:
            found.append([])
            left = most
        found[-1].append(item)
        left -= size(item)
    return found


def _bits(tensor: EncodedTensor) -> int:
    deltas = (tensor.shared, *tensor.experts)
    return sum(delta.bits for delta in deltas if delta is not None)
