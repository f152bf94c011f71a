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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import DiDiError

#: modules, or tensors, and what takes their place, by the id of the first
Pairs = Mapping[int, tuple[Any, Any]]
#: what nn.Module keeps its own contents in
_CONTENTS = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, tuple, dict, OrderedDict)
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
    originals = list(model.modules())
    twin = copy.deepcopy(model, memo)
    pairs = {id(m): (m, memo[id(m)]) for m in originals if id(m) in memo}
    for original in originals:
        for _, tensor in (*original._parameters.items(), *original._buffers.items()):
            if tensor is not None and id(tensor) in memo:
                pairs[id(tensor)] = tensor, memo[id(tensor)]
    rebind(twin.modules(), pairs)
    _check(twin, pairs, "cannot be copied: the copy would still run the original")
    return twin


def adopted(model: nn.Module) -> nn.Module:
    """The model itself, with functions that run the model it was copied from made to run its own modules.

    The original is known by what it holds: modules of the same class with equal tensors.
    """
    inside = {id(module) for module in model.modules()}
    found: dict[int, tuple[Any, Any]] = {}
    for _, foreign in _references(model):
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
    wanted = {id(tensor) for tensor in tensors}
    found = {name for name, value in _references(model) if id(value) in wanted}
    return [model.get_submodule(name) for name in sorted(found)]


def _remapped(value: Any, done: dict[int, Any]) -> Any:
    """A value in which everything that is in ``done`` is replaced; the value itself where nothing is."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, types.MethodType):
        return _remapped_method(value, done)
    if isinstance(value, types.FunctionType):
        return _remapped_function(value, done)
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
        func, *rest = (_remapped(part, done) for part in parts)
        if all(new is old for new, old in zip((func, *rest), parts)):
            return value
        count = len(value.args)
        made = type(value)(
            func, *rest[:count], **dict(zip(value.keywords, rest[count:]))
        )
        made.__dict__.update({k: _remapped(v, done) for k, v in vars(value).items()})
        return made
    if isinstance(value, weakref.ref):
        target = value()
        return weakref.ref(done[id(target)]) if id(target) in done else value
    if type(value) in _CONTAINERS:
        return _remapped_container(value, done)
    return value


def _remapped_method(
    method: types.MethodType, done: dict[int, Any]
) -> types.MethodType:
    owner = _remapped(method.__self__, done)
    function = _remapped(method.__func__, done)
    if owner is method.__self__ and function is method.__func__:
        return method
    return types.MethodType(function, owner)


def _remapped_function(function: types.FunctionType, done: dict[int, Any]) -> Any:
    # what torch.compile made of a function is left out: it would run what it was compiled from
    plain = getattr(function, "_torchdynamo_orig_callable", None)
    if plain is not None:
        other = _remapped(plain, done)
        return function if other is plain else other
    if not (
        function.__closure__
        or function.__defaults__
        or function.__kwdefaults__
        or vars(function)
    ):
        return function
    cells = [types.CellType() for _ in function.__closure__ or ()]
    made = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells) or None,
    )
    done[id(function)] = made  # functions may refer to themselves
    changed = False
    for old, new in zip(function.__closure__ or (), cells):
        try:
            held = old.cell_contents
        except ValueError:  # not filled yet
            continue
        new.cell_contents = other = _remapped(held, done)
        changed |= other is not held and other is not made
    made.__defaults__ = _remapped(function.__defaults__, done)
    made.__kwdefaults__ = _remapped(function.__kwdefaults__, done)
    made.__dict__.update({k: _remapped(v, done) for k, v in vars(function).items()})
    changed |= made.__defaults__ is not function.__defaults__
    changed |= made.__kwdefaults__ is not function.__kwdefaults__
    changed |= any(
        vars(made)[key] is not value for key, value in vars(function).items()
    )
    if not changed:
        done[id(function)] = function
        return function
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    made.__doc__ = function.__doc__
    return made


def _remapped_container(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        held = {key: _remapped(item, done) for key, item in value.items()}
        same = all(held[key] is item for key, item in value.items())
        return value if same else type(value)(held)
    items = [_remapped(item, done) for item in value]
    same = all(new is old for new, old in zip(items, value))
    return value if same else type(value)(items)


def _held(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes set on a module beside its parameters, buffers and modules, which may refer to something."""
    return [
        (key, value)
        for key, value in vars(module).items()
        if key not in _CONTENTS
        and type(value) not in _PLAIN
        and not (type(value) in _CONTAINERS and not value)
    ]


def _references(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules and tensors that what is set on modules, or put on their classes, refers to, with the name of the module."""
    kinds: set[type] = set()
    for name, module in model.named_modules():
        held = [value for _, value in _held(module)]
        for kind in type(module).__mro__:
            known = kind in kinds or kind.__module__.startswith(_LIBRARIES)
            if not known:
                kinds.add(kind)
                functions = (
                    f for f in vars(kind).values() if isinstance(f, types.FunctionType)
                )
                held += [function for function in functions if function.__closure__]
        for value in _referred(held) if held else ():
            if value is not module:
                yield name, value


def _referred(held: Iterable[Any]) -> Iterator[Any]:
    """Modules and tensors in values, and in the functions among them."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[Any]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (nn.Module, Tensor)):
            yield value
        elif isinstance(value, types.MethodType):
            yield from walk(value.__self__)
            yield from walk(value.__func__)
        elif isinstance(value, types.FunctionType):
            yield from in_function(value)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                yield from walk(part)
        elif isinstance(value, weakref.ref):
            yield from walk(value())
        elif type(value) in _CONTAINERS:
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item)
        elif hasattr(value, "__wrapped__"):
            yield from walk(value.__wrapped__)

    def in_function(function: types.FunctionType) -> Iterator[Any]:
        for cell in function.__closure__ or ():
            try:
                yield from walk(cell.cell_contents)
            except ValueError:
                continue
        for part in (function.__defaults__, function.__kwdefaults__, vars(function)):
            yield from walk(part)
        for name in _global_names(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, (nn.Module, types.MethodType)):
                yield from walk(value)

    for value in held:
        yield from walk(value)


def _global_names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_global_names, inner))


def _check(model: nn.Module, pairs: Pairs, what: str) -> None:
    """Nothing of a model may refer to the first of a pair any more.

    Raises:
        DiDiError: naming the modules that do.
    """
    originals = {i for i, (old, new) in pairs.items() if old is not new}
    names = {name for name, value in _references(model) if id(value) in originals}
    left = [
        f"{name or 'the model itself'} ({type(model.get_submodule(name)).__name__})"
        for name in sorted(names)
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
    inside = dict(own.named_modules(remove_duplicate=False))
    for name, module in foreign.named_modules(remove_duplicate=False):
        twin = inside.get(name)
        if twin is None:
            continue
        found[id(module)] = module, twin
        for part in ("_parameters", "_buffers"):
            for leaf, tensor in getattr(module, part).items():
                if tensor is not None:
                    found[id(tensor)] = tensor, getattr(twin, part).get(leaf)
    return found
