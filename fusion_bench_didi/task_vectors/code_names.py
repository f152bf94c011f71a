"""Names that functions read, found in their code."""

import dis
import inspect
from functools import lru_cache
from types import CodeType
from typing import Any

#: Instructions that read an attribute, or a method.
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
#: Instructions that read a global name, in functions and in classes inside them.
GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


@lru_cache(maxsize=4096)
def names_read(code: CodeType, instructions: tuple[str, ...]) -> frozenset[str]:
    """Names that a function, and those inside it, read by such instructions; ``co_names`` does not tell attributes from globals."""
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    read = {i.argval for i in dis.get_instructions(code) if i.opname in instructions}
    return frozenset(read).union(*(names_read(part, instructions) for part in inner))


@lru_cache(maxsize=4096)
def set_by_forward(kind: type) -> frozenset[str]:
    """Attributes that the forward of a class sets, itself and by what it goes through."""
    goes = read_by_forward(kind)
    members = (vars(base).get(name) for base in kind.__mro__ for name in goes)
    codes = filter(None, map(_code, members))
    return frozenset().union(*(names_read(code, ("STORE_ATTR",)) for code in codes))


@lru_cache(maxsize=4096)
def read_by_forward(kind: type) -> frozenset[str]:
    """Attributes that the forward of a class reads, itself and by the methods and properties of the class that it goes through."""
    found: set[str] = set()
    left = {"forward"}
    while left:
        found |= left
        members = (vars(base).get(name) for base in kind.__mro__ for name in left)
        codes = filter(None, map(_code, members))
        left = {name for code in codes for name in names_read(code, ATTRIBUTES)} - found
    return frozenset(found)


def _code(member: Any) -> CodeType | None:
    function = getattr(member, "__func__", getattr(member, "fget", member))
    whole = inspect.unwrap(function) if callable(function) else None
    return getattr(whole, "__code__", None)
