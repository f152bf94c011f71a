"""Merged models as files that others read: PEFT adapters, plain checkpoints, patches of a base model.

Each export is held against ``materialize`` before its directory appears, and says tensor by tensor what it carries.
"""

from typing import TYPE_CHECKING

from ..compat import lazy

if TYPE_CHECKING:
    from .patch import patched, to_patch
    from .peft import to_peft
    from .plain import to_plain
    from .report import ExportReport
    from .saved import export
    from .settings import AdapterSettings

_HOME = {
    "AdapterSettings": "settings",
    "ExportReport": "report",
    "export": "saved",
    "patched": "patch",
    "to_patch": "patch",
    "to_peft": "peft",
    "to_plain": "plain",
}
__all__ = list(_HOME)
__getattr__ = lazy(__name__, _HOME)
