"""Nested inputs and outputs of models: their containers, opened and closed again.

Containers are mappings (also transformers' outputs and batches), tuples and lists, dataclasses, and the caches of
transformers and of its architectures, with their layers. All else is a leaf.
"""

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

Path = tuple[Any, ...]
#: what caches call the number of their samples, where they state it: those of transformers 4, and of 5
SAMPLES = ("max_batch_size", "batch_size")


class Differing(Exception):
    """Containers that should be alike are not; says where."""


def children(value: Any) -> dict[Any, Any] | None:
    """Children of a container, by key; None for a leaf."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dict(vars(value)) if is_cache(value) or is_own_cache(value) else None


def rebuilt(value: Any, held: Mapping[Any, Any], *, fresh: bool = False) -> Any:
    """A container of the same kind that holds something else.

    Args:
        fresh: another one also where it holds the same.
    """
    if not fresh and all(held[key] is old for key, old in children(value).items()):
        return value
    kind = type(value)
    if kind is dict:
        return dict(held)
    if isinstance(value, Mapping) and dataclasses.is_dataclass(value):
        return kind(**held)
    if isinstance(value, Mapping):
        other = copy.copy(value)  # also those that are not made from pairs
        for key, item in held.items():
            other[key] = item
        return other
    if isinstance(value, (tuple, list)):
        items = list(held.values())
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    other = copy.copy(value)
    for key, item in held.items():
        object.__setattr__(other, key, item)
    return other


def mapped(
    leaf: Callable[..., Any],
    *values: Any,
    path: Path = (),
    fresh: bool = False,
    closed: Collection[Path] = (),
) -> Any:
    """The container of ``leaf(path, *leaves)`` over containers that are alike; the first one itself where all of it is the same.

    Caches are others in any case, for a forward writes to them.

    Args:
        leaf: of the path and one leaf of each value.
        *values: the first one is what the result is built like.
        closed: where containers are that are taken for leaves.

    Raises:
        Differing: where they are not alike.
    """
    opened = [None if path in closed else children(value) for value in values]
    first = opened[0]
    if first is None:
        if any(other is not None for other in opened):
            raise Differing(f"{place(path)} is a container in one output only")
        return leaf(path, *values)
    if any(other is None or other.keys() != first.keys() for other in opened):
        raise Differing(f"{place(path)} holds different things")
    fresh = fresh or is_cache(values[0]) or is_own_cache(values[0])
    held = {
        key: mapped(
            leaf,
            *(o[key] for o in opened),
            path=(*path, key),
            fresh=fresh,
            closed=closed,
        )
        for key in first
    }
    return rebuilt(values[0], held, fresh=fresh)


def leaves(value: Any, closed: Collection[Path] = ()) -> dict[Path, Any]:
    """Leaves of nested containers, by path; also the containers at the paths that are not to be opened."""
    found: dict[Path, Any] = {}
    mapped(lambda path, leaf: found.setdefault(path, leaf), value, closed=closed)
    return found


def place(path: Path) -> str:
    """A path as a reader knows it; what has no name in an output goes by its number, as in Python."""
    if path and isinstance(path[0], int):
        return "output" + "".join(f"[{part!r}]" for part in path)
    return ".".join(map(str, path)) or "the output"


def counts_samples(path: Path) -> bool:
    """Whether a number at this path is that of a cache's samples."""
    return bool(path) and path[-1] in SAMPLES


def is_cache(value: Any) -> bool:
    """Whether this is a cache of keys and values of transformers, or a layer of one."""
    return any(
        base.__module__ == "transformers.cache_utils" for base in type(value).__mro__
    )


def is_own_cache(value: Any) -> bool:
    """Whether this is a cache that an architecture of transformers has for itself, such as of states of a recurrence; in its
    tensors the samples may be any side."""
    kind = type(value)
    own = kind.__module__.startswith("transformers.models.")
    return own and kind.__name__.endswith("Cache") and not is_cache(value)


def holds_tensors(value: Any) -> bool:
    """Whether a leaf that is no tensor holds some."""
    if isinstance(value, (nn.Module, type)) or callable(value):
        return False
    held = getattr(value, "__dict__", {}).values()
    lists = (v for v in held if isinstance(v, (tuple, list)))
    return any(isinstance(v, Tensor) for v in (*held, *(x for l in lists for x in l)))


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor with a side, depth first."""
    if isinstance(value, Tensor):
        return value if value.ndim else None
    for child in (children(value) or {}).values():
        if (found := first_tensor(child)) is not None:
            return found
    return None
