"""Caches of keys and values that a forward reads and extends, where a batch is run in parts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import DiDiError
from .calls import Call
from .outputs import Layout, joined
from .trees import Path, children, is_cache, is_own_cache, leaves, mapped, rebuilt

#: Arguments that hold what came before where they are plain sequences.
PASTS = ("past_key_values", "cache_params", "state", "mems")


class Caches:
    """The caches of a call. After its parts have run they hold what they would after one run of the whole.

    Args:
        call: of the whole batch.
        parts: of some of its samples each, with copies of the caches.
    """

    def __init__(self, call: Call, parts: Sequence[Call]):
        self._given = caches_of(call)
        self._copies = {n: [part.given[n] for part in parts] for n in self._given}
        self._marks: dict[int, _Mark] = {}
        for name, copies in self._copies.items():
            self._marks.update(dict.fromkeys(map(id, copies), _Mark(name)))

    def marked(self, output: Any) -> Any:
        """An output without the copies; :meth:`filled` puts the caches as given in their places."""
        return _without(output, self._marks) if self._marks else output

    def filled(self, output: Any, orders: Sequence[Tensor]) -> Any:
        """The output, once the caches as given hold the rows of all parts.

        Args:
            orders: of each part, where its samples are in the batch as given.
        """
        if not self._marks:
            return output
        for name, copies in self._copies.items():
            held = leaves(copies[0]).items()
            sides = {
                path: ((0, 1),) if value.ndim and value.numel() else ()
                for path, value in held
                if isinstance(value, Tensor)
            }
            whole = joined(
                copies, orders, Layout(sides), names=lambda i: f"part {i + 1}"
            )
            vars(self._given[name]).update(vars(whole))

        def put(_: Path, leaf: Any) -> Any:
            return self._given[leaf.name] if isinstance(leaf, _Mark) else leaf

        return mapped(put, output)


class _Mark:
    """Where an output held a cache.

    Args:
        name: of the argument that gave it.
    """

    def __init__(self, name: str):
        self.name = name


def caches_of(call: Call) -> dict[str, Any]:
    """Caches among the arguments, by name."""
    return {name: value for name, value in call.given.items() if is_cache(value)}


def without_pasts(call: Call) -> Call:
    """A call without its caches, which are empty: one that may run more than once, for a forward writes to them.

    Raises:
        DiDiError: naming one that holds something: what is given now does not tell then which task came before.
    """

    def kept(name: str, value: Any) -> Any:
        named = name in PASTS and isinstance(value, (list, tuple))
        if not named and not is_cache(value) and not is_own_cache(value):
            return value
        if _is_filled(value):
            raise DiDiError(
                f"{name} holds what came before, and the tasks of that cannot be found in what is given now. Give the task_ids "
                "(or task_weights) that the first tokens had, or call generate(...), which finds tasks once."
            )
        return None

    return call.changed(kept)


def _is_filled(value: Any) -> bool:
    """Whether some tensor with a side holds something; room that is kept is zero."""
    held = leaves(value).values()
    return any(isinstance(x, Tensor) and x.ndim and bool(x.any()) for x in held)


def _without(value: Any, marks: dict[int, _Mark]) -> Any:
    if id(value) in marks:
        return marks[id(value)]
    held = children(value)
    if held is None:
        return value
    return rebuilt(value, {key: _without(item, marks) for key, item in held.items()})
