"""The host's OpenCLIP pool, telling dynamic models their task."""

from fusion_bench.taskpool import OpenCLIPVisionModelTaskPool

from ..options import checked
from .task_switching import TaskAware


@checked
class TaskAwareOpenCLIPVisionModelTaskPool(TaskAware, OpenCLIPVisionModelTaskPool):
    """Evaluates any model with ``set_task`` on each task with that task's expert."""
