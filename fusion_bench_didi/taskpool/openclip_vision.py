"""The host's OpenCLIP pool, telling dynamic models their task."""

from typing import Any

from fusion_bench.taskpool import OpenCLIPVisionModelTaskPool

from ..options import checked
from .rehearsal import rehearses
from .task_switching import TaskAware


@checked
class TaskAwareOpenCLIPVisionModelTaskPool(TaskAware, OpenCLIPVisionModelTaskPool):
    """Evaluates any model with ``set_task`` on each task with that task's expert.

    Args:
        fast_dev_run: evaluate one batch per task; None: as the program says.
        **kwargs: the host pool's arguments.
    """

    def __init__(self, *args: Any, fast_dev_run: bool | None = None, **kwargs: Any):
        super().__init__(*args, fast_dev_run=rehearses(fast_dev_run), **kwargs)
