"""DiDi-Merging for FusionBench: a shared low-rank model and one low-rank expert per task, within a storage budget.

Importing this package loads neither torch nor the host, because the Hydra search-path plugin imports it at every
start of any Hydra program. The public names are loaded at first use.
"""

from typing import TYPE_CHECKING

from . import compat

if TYPE_CHECKING:
    from .artifacts.saving import load
    from .merging.pipeline import merge, plan
    from .merging.settings import Budget, MergeSettings
    from .method.didi import DiDiMerging
    from .models.dynamic import DiDiModel
    from .task_vectors.reader import TaskVectors

__version__ = "0.1.0"
_HOME = {
    "Budget": "merging.settings",
    "DiDiMerging": "method.didi",
    "DiDiModel": "models.dynamic",
    "MergeSettings": "merging.settings",
    "TaskVectors": "task_vectors.reader",
    "load": "artifacts.saving",
    "merge": "merging.pipeline",
    "plan": "merging.pipeline",
}
__all__ = [*_HOME, "__version__"]

compat.apply()
__getattr__ = compat.lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
