"""Where stored deltas go while a merge runs: into memory, or to disk behind the arithmetic."""

from collections.abc import Mapping
from typing import Protocol

from .base import Delta

Shared = Mapping[str, Delta]


Experts = Mapping[str, Mapping[str, Delta]]


class DeltaSink(Protocol):
    """Takes deltas one by one and gives all of them back."""

    def put(self, task: str | None, name: str, delta: Delta) -> None:
        """Take the delta of a tensor; ``task`` None for the shared part."""

    def close(self) -> tuple[Shared, Experts]:
        """All deltas, shared and by task."""


class InMemory:
    """Keeps deltas as they are."""

    def __init__(self, tasks: tuple[str, ...]):
        self._shared: dict[str, Delta] = {}
        self._experts: dict[str, dict[str, Delta]] = {task: {} for task in tasks}

    def put(self, task: str | None, name: str, delta: Delta) -> None:
        (self._shared if task is None else self._experts[task])[name] = delta

    def close(self) -> tuple[Shared, Experts]:
        return self._shared, self._experts
