"""Programs beside the host's: the side-by-side comparison.

Loaded at first use: what reads a finished comparison needs neither torch nor the host.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import ComparisonProgram

__all__ = ["ComparisonProgram"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".compare", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
