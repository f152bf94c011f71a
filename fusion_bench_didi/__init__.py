"""DiDi-Merging for FusionBench: a shared low-rank model and one low-rank expert per task, within a storage budget.

Importing this package loads neither torch nor the host, because the Hydra search-path plugin imports it at every
start of any Hydra program. The public names are loaded at first use.
"""

from typing import TYPE_CHECKING

from . import compat

if TYPE_CHECKING:
    from .method.didi import DiDiMerging
    from .models.dynamic import DiDiModel

__version__ = "0.1.0"
__all__ = ["DiDiMerging", "DiDiModel", "__version__"]

compat.apply()
__getattr__ = compat.lazy(__name__, {"DiDiMerging": "method", "DiDiModel": "models"})
