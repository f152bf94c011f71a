"""The host's CLIP pool, telling dynamic models their task."""

from collections.abc import Mapping

from fusion_bench.taskpool import CLIPVisionModelTaskPool

from .task_switching import attach


class TaskAwareCLIPVisionModelTaskPool(CLIPVisionModelTaskPool):
    """Evaluates any model with ``set_task`` (DiDi, EMR) on each task with that task's expert.

    Args:
        task_aliases: task pool name -> model name, for names that the naming rule does not match.
        **kwargs: the host pool's arguments.
    """

    def __init__(self, *args, task_aliases: Mapping[str, str] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        attach(self, aliases=task_aliases)
