"""Functions that are put on live modules, hooks and forwards of their own: told from one another by their code and what they hold."""

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import chain
from types import CellType
from typing import Any

from torch import Tensor, nn, strided

from ..task_vectors.code_names import names_read, read_by_forward
from ..task_vectors.digests import digests

#: Libraries whose functions run a forward as it is (casts, moves, compiles, is quicker), or look on.
_RUNNERS = (
    *("accelerate.", "deepspeed.", "kernels.", "lightning.", "liger_kernel.", "peft."),
    *("pytorch_lightning.", "torch._dynamo.", "torch.amp.", "transformers.", "wandb."),
    "torch.nn.utils.prune.",  # by masks, which are tensors
)
#: What a variable that was deleted leaves.
_EMPTY = CellType()
#: Functions in functions that are looked into.
_DEPTH = 4


def replaced(module: nn.Module) -> dict[str, Any]:
    """The forward, and methods that it goes through, that are set on the module itself in place of its class's."""
    kind, found = type(module), {}
    for key in vars(module).keys() & read_by_forward(kind):
        plain, value = getattr(kind, key, None), vars(module)[key]
        if callable(plain) and callable(value) and not isinstance(value, nn.Module):
            found[key] = told(value)
            if found[key] is None or found[key] == told(plain):
                del found[key]
    return found


def hooks(module: nn.Module) -> list[Any]:
    """What tells the hooks around a module's forward from others."""
    both = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [known for known in map(told, both) if known is not None]


def told(value: Any, depth: int = _DEPTH) -> Any:
    """What is equal for functions of one code that hold the same numbers, texts, tensors and functions; None for those of libraries
    that compute nothing of their own."""
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    function = _function(value)
    if f"{getattr(function, '__globals__', {}).get('__name__')}.".startswith(_RUNNERS):
        inside = getattr(value, "__wrapped__", getattr(function, "__wrapped__", None))
        return None if inside is None or not depth else told(inside, depth - 1)
    if not hasattr(function, "__code__"):
        return getattr(value, "__qualname__", type(value).__qualname__)
    held = {key: _plain(one, depth) for key, one in _held(value, function)}
    return function.__code__, {k: one for k, one in held.items() if one is not None}


def _function(value: Any) -> Any:
    """What runs where a method, a partial function or an object is called."""
    if isinstance(value, partial):
        return _function(value.func)
    value = getattr(value, "__func__", value)
    return value if hasattr(value, "__code__") else type(value).__call__


def _held(value: Any, function: Any) -> Iterator[tuple[str, Any]]:
    """Arguments, variables around and attributes that a function reads, without those that it sets."""
    code = function.__code__
    written = names_read(code, ("STORE_DEREF",))
    if isinstance(value, partial):
        yield from enumerate(value.args)
        yield from value.keywords.items()
        value = value.func
    yield from enumerate(function.__defaults__ or (), 100)
    yield from (function.__kwdefaults__ or {}).items()
    for key, cell in zip(code.co_freevars, function.__closure__ or ()):
        if key not in written and cell != _EMPTY:
            yield key, cell.cell_contents
    owner = getattr(value, "__self__", value)
    if owner is not function and not isinstance(owner, nn.Module):
        kept = getattr(owner, "__dict__", {}).items()
        yield from ((key, one) for key, one in kept if key not in _set_by(type(owner)))


@lru_cache(maxsize=256)
def _set_by(kind: type) -> frozenset[str]:
    """Attributes that methods of a class set once there is an object."""
    methods = chain.from_iterable(vars(base).items() for base in kind.__mro__)
    codes = (getattr(m, "__code__", None) for name, m in methods if name != "__init__")
    return frozenset().union(*(names_read(code, ("STORE_ATTR",)) for code in codes if code))  # fmt: skip


def _plain(value: Any, depth: int) -> Any:
    """A value that can be compared; None for what has none, and for lists and dictionaries, where hooks leave what they see."""
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Tensor) and value.layout == strided and not value.is_meta:
        value = value.resolve_conj().resolve_neg()
        return digests({"": value.detach()})[""]
    if isinstance(value, tuple):
        return tuple(_plain(one, depth) for one in value)
    if callable(value) and depth and not isinstance(value, (type, nn.Module)):
        return told(value, depth - 1)
    return None
