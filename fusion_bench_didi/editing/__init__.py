"""Merged models that are edited after the merge: tasks added, removed and combined, budgets lowered, adapters kept in libraries.

Every operation is one of models in memory and of saved directories; see ``docs/editing.md``.
"""

from typing import TYPE_CHECKING

from ..compat import lazy

if TYPE_CHECKING:
    from .adding import add_task
    from .combining import combine
    from .library import AdapterLibrary
    from .loading import load_tasks
    from .removing import remove_task
    from .rescaling import rescale

_HOME = {
    "add_task": "adding",
    "combine": "combining",
    "AdapterLibrary": "library",
    "load_tasks": "loading",
    "remove_task": "removing",
    "rescale": "rescaling",
}
__all__ = list(_HOME)
__getattr__ = lazy(__name__, _HOME)
