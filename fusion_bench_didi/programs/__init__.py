"""Programs beside the host's: the side-by-side comparison.

Loaded at first use: what reads a finished comparison needs neither torch nor the host.
"""

from typing import TYPE_CHECKING

from ..compat import lazy

if TYPE_CHECKING:
    from .compare import ComparisonProgram

__all__ = ["ComparisonProgram"]
__getattr__ = lazy(__name__, {"ComparisonProgram": "compare"})
