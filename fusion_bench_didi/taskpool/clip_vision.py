"""The host's CLIP pool, telling dynamic models their task."""

from fusion_bench.taskpool import CLIPVisionModelTaskPool

from ..options import checked
from .task_switching import TaskAware


@checked
class TaskAwareCLIPVisionModelTaskPool(TaskAware, CLIPVisionModelTaskPool):
    """Evaluates any model with ``set_task`` (DiDi, EMR) on each task with that task's expert."""
