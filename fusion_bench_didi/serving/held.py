"""Decoded tensors of tasks that are asked often, as many as a number of bytes allows."""

import threading
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from ..lowrank.arithmetic import without_autocast

#: What is held of one tensor of one task: the matrix, or factors.
Decoded = tuple[Tensor | None, ...]


class Held:
    """Decoded tensors by tensor and task; those of the task that was asked for least recently make room.

    What a batch does not leave room for is made anew and displaces nothing of the same batch, so that as much of a batch
    that is too large is at hand in the next one.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self._lock = threading.Lock()
        #: with the bytes of each
        self._entries: dict[int, dict[Hashable, tuple[Decoded, int]]] = {}
        self._asked: dict[int, int] = {}
        self._batches = self._bytes = 0

    @property
    def nbytes(self) -> int:
        return self._bytes

    @property
    def tasks(self) -> list[int]:
        """Tasks of which something is held."""
        return [task for task, held in self._entries.items() if held]

    def ask(self, tasks: Iterable[int]) -> None:
        """A batch of these tasks begins."""
        with self._lock:
            self._batches += 1
            self._asked.update(dict.fromkeys(tasks, self._batches))

    def get(
        self, name: Hashable, task: int, size: int, make: Callable[[], Decoded]
    ) -> Decoded | None:
        """A decoded tensor: held already, made if there is room for it, None if there is none.

        Args:
            size: bytes that it takes.
        """
        with self._lock:
            found = self._entries.get(task, {}).get(name)
            if found is not None:
                return found[0]
            if not self._room(task, size):
                return None
            self._bytes += size
        try:
            with torch.inference_mode(False), torch.no_grad(), without_autocast():
                made = make()
        except BaseException:
            with self._lock:
                self._bytes -= size
            raise
        with self._lock:
            entries = self._entries.setdefault(task, {})
            kept, _ = entries.setdefault(name, (made, size))
            if kept is not made:  # by another thread meanwhile
                self._bytes -= size
        return kept

    def _room(self, task: int, size: int) -> bool:
        now = self._asked.get(task, 0)
        older = [t for t in self._entries if self._asked.get(t, 0) < now]
        free = self.limit - self._bytes
        free += sum(taken for t in older for _, taken in self._entries[t].values())
        if free < size:
            return False
        for other in sorted(older, key=lambda t: self._asked.get(t, 0)):
            while self._entries[other] and self._bytes + size > self.limit:
                _, (_, taken) = self._entries[other].popitem()
                self._bytes -= taken
        return True
