"""Copies of models that run their own modules and tensors, also where a module's methods were replaced on the instance.

A function that is set on a module, such as the ``forward`` that the host's pools put on ResNet, ConvNeXt and DINOv2, keeps the
module that it was made for: in its closure, as a bound method, in a partial or in its defaults. Copied with the module it
would still run the original. Here such functions are made anew for the copy.
"""

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..errors import DiDiError
from ..task_vectors.code_names import GLOBALS, names_read

#: modules, or tensors, and what takes their place, by the id of the first
Pairs = Mapping[int, tuple[Any, Any]]
#: what nn.Module keeps its own contents in
_CONTENTS = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, tuple, dict, OrderedDict)
#: what functions refer to beside their closure
_OF_FUNCTIONS = ("__defaults__", "__kwdefaults__", "__dict__")
_PLAIN = (bool, int, float, str, type(None), set)
#: where classes come from whose functions know none of their instances
_LIBRARIES = ("torch.", "transformers.", "builtins", "typing")


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """An independent copy of a model.

    Args:
        memo: of an outer ``copy.deepcopy``.

    Raises:
        DiDiError: if some function of the copy would still run the original.
    """
    memo = {} if memo is None else memo
    originals: list[Any] = [*model.modules()]
    # what modules hold, whatever their own methods would list
    for held in [vars(module) for module in originals]:
        originals += [*held["_parameters"].values(), *held["_buffers"].values()]
    twin = copy.deepcopy(model, memo)
    pairs = {
        id(own): (own, memo[id(own)])
        for own in originals
        if own is not None and id(own) in memo
    }
    rebind(twin.modules(), pairs)
    _check(twin, pairs, "cannot be copied: the copy would still run the original")
    return twin


def adopted(model: nn.Module) -> nn.Module:
    """The model itself, with functions that run the model it was copied from made to run its own modules.

    The original is known by what it holds: modules of the same class with equal tensors.
    """
    inside = {id(module) for module in model.modules()}
    found: dict[int, tuple[Any, Any]] = {}
    for _, foreign in references(model):
        if isinstance(foreign, nn.Module) and id(foreign) not in inside:
            own = _counterpart(foreign, model)
            if own is not None:
                found.update(_pairs(foreign, own))
    if found:
        rebind(model.modules(), found)
        _check(model, found, "was copied with functions that run the original")
    return model


def rebind(modules: Iterable[nn.Module], pairs: Pairs, *, hooks: bool = True) -> None:
    """Make what is set on modules refer to the second of each pair instead of the first.

    Args:
        hooks: also what is called before and after a forward.
    """
    done: dict[int, Any] = {i: new for i, (_, new) in pairs.items()}
    for module in modules:
        for key, value in _held(module):
            if hooks or not key.endswith("_hooks"):
                other = _remapped(value, done)
                if other is not value:
                    module.__dict__[key] = other


def holders_of(model: nn.Module, tensors: Iterable[Tensor]) -> list[nn.Module]:
    """Modules that hold some tensors of the model also elsewhere than among their parameters: in lists, and in functions."""
    names = _referring(model, {id(tensor) for tensor in tensors})
    return [model.get_submodule(name) for name in names]


def _referring(model: nn.Module, ids: Set[int]) -> list[str]:
    """Names of the modules of which :func:`references` finds some of these."""
    return sorted({name for name, value in references(model) if id(value) in ids})


def references(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules and tensors that what is set on modules, or put on their classes, refers to, with the name of the module."""
    kinds: set[type] = set()
    for name, module in model.named_modules():
        held = [value for _, value in _held(module)]
        for kind in type(module).__mro__:
            known = kind in kinds or kind.__module__.startswith(_LIBRARIES)
            if not known:
                kinds.add(kind)
                held += [
                    function
                    for key, function in vars(kind).items()
                    if isinstance(function, types.FunctionType)
                    and function.__closure__
                    and key != "__init__"  # no copy runs it
                ]
        for value in _referred(held) if held else ():
            if value is not module:
                yield name, value


def _remapped(value: Any, done: dict[int, Any]) -> Any:
    """A value in which everything that is in ``done`` is replaced; the value itself where nothing is."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, weakref.ref):
        target = value()
        return weakref.ref(done[id(target)]) if id(target) in done else value
    blank = None
    if isinstance(value, types.FunctionType):
        # what torch.compile made of a function is left out: it would run what it was compiled from
        plain = getattr(value, "_torchdynamo_orig_callable", None)
        if plain is not None:
            other = _remapped(plain, done)
            return value if other is plain else other
        blank = _blank(value)
    parts = _parts(value) or {}
    # what leads back to itself becomes the new function; of other kinds it stays the old one, which is found and refused
    done[id(value)] = value if blank is None else blank
    others = {key: _remapped(part, done) for key, part in parts.items()}
    if blank is None:
        del done[id(value)]
    alike = (
        others[key] is part or (blank is not None and others[key] is blank)
        for key, part in parts.items()
    )
    if not all(alike):
        return _built(value, others, blank)
    if blank is not None:
        done[id(value)] = value
    return value


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a value refers to; None for what is not looked into."""
    if isinstance(value, types.MethodType):
        return {"function": value.__func__, "owner": value.__self__}
    if isinstance(value, functools.partial):
        given = {"args": value.args, "keywords": value.keywords}
        return {"function": value.func, **given, "attributes": vars(value)}
    if isinstance(value, types.FunctionType):
        held = {key: getattr(value, key) for key in _OF_FUNCTIONS}
        for place, cell in enumerate(value.__closure__ or ()):
            with suppress(ValueError):  # not filled yet
                held[place] = cell.cell_contents
        return held
    if type(value) in _CONTAINERS:
        return dict(value if isinstance(value, dict) else enumerate(value))
    return None


def _blank(function: types.FunctionType) -> types.FunctionType:
    """A function of the same code that refers to nothing yet."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    code, name = function.__code__, function.__name__
    made = types.FunctionType(code, function.__globals__, name, None, cells or None)
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    made.__doc__ = function.__doc__
    return made


def _built(value: Any, parts: Mapping[Any, Any], blank: Any) -> Any:
    """A value that refers to other parts.

    Args:
        blank: what becomes of a function.
    """
    if isinstance(value, types.MethodType):
        return types.MethodType(parts["function"], parts["owner"])
    if isinstance(value, functools.partial):
        made = type(value)(parts["function"], *parts["args"], **parts["keywords"])
        made.__dict__.update(parts["attributes"])
        return made
    if blank is None:
        return type(value)(parts if isinstance(value, dict) else parts.values())
    for place, cell in enumerate(blank.__closure__ or ()):
        if place in parts:
            cell.cell_contents = parts[place]
    blank.__defaults__ = parts["__defaults__"]
    blank.__kwdefaults__ = parts["__kwdefaults__"]
    blank.__dict__.update(parts["__dict__"])
    return blank


def _held(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes set on a module beside its parameters, buffers and modules, which may refer to something."""
    return [
        (key, value)
        for key, value in vars(module).items()
        if key not in _CONTENTS
        and type(value) not in _PLAIN
        and not (type(value) in _CONTAINERS and not value)
    ]


def _referred(held: Iterable[Any]) -> Iterator[Any]:
    """Modules and tensors in values, and in the functions among them."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[Any]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (nn.Module, Tensor)):
            yield value
            return
        parts = _parts(value)
        if isinstance(value, weakref.ref):
            parts = {"target": value()}
        elif isinstance(value, types.FunctionType):
            for name in names_read(value.__code__, GLOBALS):
                part = value.__globals__.get(name)
                if isinstance(part, (nn.Module, types.MethodType)):
                    parts[name] = part
        elif parts is None:
            parts = {"wrapped": getattr(value, "__wrapped__", None)}
        for part in parts.values():
            yield from walk(part)

    for value in held:
        yield from walk(value)


def _check(model: nn.Module, pairs: Pairs, what: str) -> None:
    """Nothing of a model may refer to the first of a pair any more.

    Raises:
        DiDiError: naming the modules that do.
    """
    originals = {i for i, (old, new) in pairs.items() if old is not new}
    left = [
        f"{name or 'the model itself'} ({type(model.get_submodule(name)).__name__})"
        for name in _referring(model, originals)
    ]
    if left:
        raise DiDiError(
            f"{type(model).__name__} {what}, through functions of {', '.join(left[:4])}. Have such functions refer to their module by an "
            "argument or a closure, not by a global name, a cache or their class."
        )


def _counterpart(foreign: nn.Module, model: nn.Module) -> nn.Module | None:
    """The module that holds the same as a foreign one; None if it is unlike all of them.

    Raises:
        DiDiError: if there are several.
    """
    alike = [
        m for m in model.modules() if type(m) is type(foreign) and _equal(m, foreign)
    ]
    if len(alike) > 1:
        raise DiDiError(
            f"Some function of {type(model).__name__} runs a {type(foreign).__name__} of the model that this one was copied from, "
            f"and {len(alike)} modules are equal to it. Copy the model before its functions are replaced."
        )
    return alike[0] if alike else None


def _equal(left: nn.Module, right: nn.Module) -> bool:
    one, other = left.state_dict(), right.state_dict()
    return (
        bool(one)
        and one.keys() == other.keys()
        and all(v.shape == other[k].shape and v.equal(other[k]) for k, v in one.items())
    )


def _pairs(foreign: nn.Module, own: nn.Module) -> dict[int, tuple[Any, Any]]:
    """Modules, parameters and buffers of two models of one structure."""
    found: dict[int, tuple[Any, Any]] = {}
    for kind in ("named_modules", "named_parameters", "named_buffers"):
        inside = dict(getattr(own, kind)(remove_duplicate=False))
        for name, part in getattr(foreign, kind)(remove_duplicate=False):
            if name in inside:
                found[id(part)] = part, inside[name]
    return found
