"""A cache bounded by the size of what it holds; what was used longest ago goes first."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values that are made when they are first asked for, and kept while there is room; the newest is kept in any case.

    Args:
        room: the sum of sizes that is kept.
        size: of a value.
    """

    def __init__(self, room: int, size: Callable[[Value], int]):
        self._room, self._size, self._held = room, size, 0
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, by ``make`` if it is not there."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = self._kept[key] = make()
        self._held += self._size(value)
        while self._held > self._room and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._held -= self._size(oldest)
        return value
