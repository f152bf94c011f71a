"""The embedded default: eight tasks on a small CLIP, made on the spot and then cached.

>>> from fusion_bench_didi import demo
>>> suite = demo.build_suite(seed=0)  # a folder; takes minutes the first time
>>> demo.register_suite_tasks(suite)  # so that the host knows the class names

The pools for ``modelpool=didi/demo taskpool=didi/demo`` are in :mod:`.pools`, apart
from here because they need the host.
"""

from typing import TYPE_CHECKING

from ..compat import lazy

if TYPE_CHECKING:
    from .registry import register_suite_tasks, register_tasks
    from .suite import build_suite, suite_path

__all__ = ["build_suite", "register_suite_tasks", "register_tasks", "suite_path"]
__getattr__ = lazy(
    __name__,
    {
        "build_suite": "suite",
        "suite_path": "suite",
        "register_suite_tasks": "registry",
        "register_tasks": "registry",
    },
)
