"""The unit in which encoded tensors pass from a form to memory, files, account and report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .base import Delta

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


class Sink(Protocol):
    """Takes encoded tensors one by one and gives all deltas back. A context: left by an error, nothing more is written."""

    def put(self, tensor: EncodedTensor) -> None:
        """Take one tensor; its experts are those of the sink's tasks, in their order."""

    def close(self) -> tuple[Shared, Experts]:
        """All deltas, shared and by task."""

    def __enter__(self) -> "Sink": ...

    def __exit__(self, *error) -> None: ...


class InMemory:
    """Keeps deltas as they are.

    Args:
        tasks: in the order of ``EncodedTensor.experts``.
    """

    def __init__(self, tasks: Sequence[str]):
        self._shared: dict[str, Delta] = {}
        self._experts: dict[str, dict[str, Delta]] = {task: {} for task in tasks}

    def put(self, tensor: EncodedTensor) -> None:
        if tensor.shared is not None:
            self._shared[tensor.name] = tensor.shared
        for deltas, delta in zip(self._experts.values(), tensor.experts, strict=True):
            if delta is not None:
                deltas[tensor.name] = delta

    def close(self) -> tuple[Shared, Experts]:
        return self._shared, self._experts

    def __enter__(self) -> "InMemory":
        return self

    def __exit__(self, *error) -> None:
        return None
