"""Results of a merge as safetensors: tensors beside a tree in JSON, so that reading one builds nothing but what is named here.

A tree knows numbers, words, tuples, lists, dictionaries, tensors and their types, and the dataclasses that it is given; an object
that several places hold is one object again.
"""

import dataclasses
import json
from collections.abc import Mapping
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
        seen: dict[int, Any] = {}
        root = self._packed(value, tensors, objects, seen)
        tree = json.dumps({"root": root, "objects": objects})
        return save(tensors, metadata={_TREE: tree})

    def _packed(self, value: Any, tensors, objects, seen) -> Any:
        def inner(part: Any) -> Any:
            return self._packed(part, tensors, objects, seen)

        if isinstance(value, _PLAIN):
            return value
        if id(value) in seen:
            return seen[id(value)]
        name = type(value).__name__
        if isinstance(value, Tensor):
            found: Any = {"tensor": str(len(tensors))}
            tensors[found["tensor"]] = independent(value).clone()
        elif isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        elif isinstance(value, (tuple, list)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [inner(part) for part in value]}
        elif isinstance(value, dict):
            return {"dict": [[inner(k), inner(v)] for k, v in value.items()]}
        elif self._classes.get(name) is type(value):
            fields = dataclasses.fields(value)
            parts = {f.name: inner(getattr(value, f.name)) for f in fields}
            objects.append([name, parts])
            found = {"object": len(objects) - 1}
        elif name in self._others and isinstance(value, self._others[name][0]):
            objects.append([name, inner(self._others[name][1].plain(value))])
            found = {"object": len(objects) - 1}
        else:
            raise TypeError(f"a {name} cannot be recorded")
        seen[id(value)] = found
        return found

    def unpacked(self, content: bytes) -> Any:
        """The value that :meth:`packed` wrote."""
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        tensors, tree = load(content), json.loads(header["__metadata__"][_TREE])
        made: list[Any] = []

        def inner(part: Any) -> Any:
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
                return {inner(k): inner(v) for k, v in held}
            return {"tuple": tuple, "list": list}[kind](map(inner, held))

        for name, parts in tree["objects"]:
            if name in self._others:
                made.append(self._others[name][1].made(inner(parts)))
            else:
                fields = {key: inner(part) for key, part in parts.items()}
                made.append(self._classes[name](**fields))
        return inner(tree["root"])
