"""Results of a merge as safetensors: tensors beside a tree in JSON, so that reading one builds nothing but what is named here.

A tree knows numbers, words, tuples, lists, dictionaries, tensors and their types, and the dataclasses that it is given; an object
that several places hold is one object again.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

from .tensors import independent

_PLAIN = (bool, int, float, str, type(None))
_TREE = "tree"


class Recorded(Protocol):
    """How objects of a class that is no plain dataclass are recorded."""

    def plain(self, value: Any) -> Any:
        """The recorded content of an object."""

    def made(self, plain: Any) -> Any:
        """One of what was recorded."""


class Records:
    """Values as bytes, and back.

    Args:
        classes: dataclasses that may occur.
        others: by class, how its objects are recorded.
    """

    def __init__(
        self, classes: tuple[type, ...] = (), others: Mapping[type, Recorded] = {}
    ):
        self._classes = {cls.__name__: cls for cls in classes}
        self._others = {cls.__name__: (cls, how) for cls, how in others.items()}

    def packed(self, value: Any) -> bytes:
        """A record as the bytes of a safetensors file."""
        tensors: dict[str, Tensor] = {}
        objects: list[Any] = []
        root = self._packed(value, tensors, objects, {})
        tree = json.dumps({"root": root, "objects": objects})
        return save(tensors, metadata={_TREE: tree})

    def _packed(
        self,
        part: Any,
        tensors: dict[str, Tensor],
        objects: list[Any],
        seen: dict[int, Any],
    ) -> Any:
        """A part of the tree; a method, as a closure that calls itself would hold the tensors until garbage is looked for."""

        def inner(part: Any) -> Any:
            return self._packed(part, tensors, objects, seen)

        if isinstance(part, _PLAIN):
            return part
        if id(part) in seen:
            return seen[id(part)]
        if isinstance(part, torch.dtype):
            return {"dtype": str(part).removeprefix("torch.")}
        if isinstance(part, (tuple, list)):
            kind = "list" if isinstance(part, list) else "tuple"
            return {kind: [*map(inner, part)]}
        if isinstance(part, dict):
            return {"dict": [[inner(k), inner(v)] for k, v in part.items()]}
        if isinstance(part, Tensor):
            found: Any = {"tensor": str(len(tensors))}
            tensors[found["tensor"]] = independent(part).clone()
        else:
            objects.append([type(part).__name__, self._content(part, inner)])
            found = {"object": len(objects) - 1}
        seen[id(part)] = found
        return found

    def _content(self, value: Any, inner: Callable[[Any], Any]) -> Any:
        """What is recorded of an object."""
        name = type(value).__name__
        if self._classes.get(name) is type(value):
            fields = dataclasses.fields(value)
            return {f.name: inner(getattr(value, f.name)) for f in fields}
        if name in self._others and isinstance(value, self._others[name][0]):
            return inner(self._others[name][1].plain(value))
        raise TypeError(f"a {name} cannot be recorded")

    def unpacked(self, content: bytes) -> Any:
        """The value that :meth:`packed` wrote."""
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        tensors, tree = load(content), json.loads(header["__metadata__"][_TREE])
        made: list[Any] = []

        def inner(part: Any) -> Any:
            return _unpacked(part, tensors, made)

        for name, parts in tree["objects"]:
            if name in self._others:
                made.append(self._others[name][1].made(inner(parts)))
            else:
                fields = {key: inner(part) for key, part in parts.items()}
                made.append(self._classes[name](**fields))
        return inner(tree["root"])


def _unpacked(part: Any, tensors: Mapping[str, Tensor], made: list[Any]) -> Any:
    """What a part of the tree stands for.

    Args:
        made: objects that came before.
    """
    if isinstance(part, _PLAIN):
        return part
    ((kind, held),) = part.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dtype":
        return getattr(torch, held)
    if kind == "object":
        return made[held]
    if kind == "dict":
        pairs = ([_unpacked(p, tensors, made) for p in pair] for pair in held)
        return dict(pairs)
    parts = (_unpacked(p, tensors, made) for p in held)
    return {"tuple": tuple, "list": list}[kind](parts)
