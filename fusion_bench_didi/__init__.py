"""DiDi-Merging for FusionBench: a shared low-rank model and one low-rank expert per task, within a storage budget.

Importing this package loads neither torch nor the host, because the Hydra search-path plugin imports it at every
start of any Hydra program. The public names are loaded at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compat

if TYPE_CHECKING:
    from .method.didi import DiDiMerging
    from .models.dynamic import DiDiModel

__version__ = "0.1.0"
__all__ = ["DiDiMerging", "DiDiModel", "__version__"]

_HOME = {"DiDiMerging": "method", "DiDiModel": "models"}

compat.apply()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
