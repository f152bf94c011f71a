"""Public names of a package that are loaded at first use."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose public names are loaded at first use.

    Args:
        package: its name.
        home: public name -> module within the package, or ``module:name`` where the name is another there.
    """

    def find(name: str) -> Any:
        if name in home:
            module, _, inner = home[name].partition(":")
            return getattr(import_module(f"{package}.{module}"), inner or name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
