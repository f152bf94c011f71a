"""The host's OpenCLIP pool, telling dynamic models their task."""

from collections.abc import Mapping

from ..compat import apply as _apply_workarounds
from .task_switching import attach

_apply_workarounds()

from fusion_bench.taskpool import OpenCLIPVisionModelTaskPool  # noqa: E402


class TaskAwareOpenCLIPVisionModelTaskPool(OpenCLIPVisionModelTaskPool):
    """Evaluates any model with ``set_task`` on each task with that task's expert.

    Args:
        task_aliases: task pool name -> model name, for names that the naming rule does not match.
        **kwargs: the host pool's arguments.
    """

    def __init__(self, *args, task_aliases: Mapping[str, str] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        attach(self, aliases=task_aliases)
