"""One model on one task of any host task pool.

The host evaluates a model on every task of a pool; a comparison wants single tasks, because fine-tuned models are asked
for their own task only, and because a killed run should not repeat what it has.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..pools.task_names import only, pool_tasks
from ..report.answer import figure
from ..taskpool.task_switching import HOOKS, attach
from .entries import ComparisonError


class Scorer:
    """Evaluates on single tasks and lets go of the model afterwards.

    Args:
        taskpool: a host task pool; it is made to tell dynamic models their task.
        aliases: task pool name -> model name.

    Raises:
        ComparisonError: for a pool that does not tell its tasks.
    """

    def __init__(self, taskpool: Any, aliases: Mapping[str, str] | None = None):
        self.taskpool = taskpool
        self.tasks = pool_tasks(taskpool)
        if not self.tasks:
            raise ComparisonError(
                f"{type(taskpool).__name__} does not tell which tasks it evaluates, so there is nothing to compare on. "
                "Give a task pool with test datasets, taskpool=CLIPVisionModelTaskPool/... for instance."
            )
        attach(taskpool, aliases=aliases)
        if not getattr(taskpool, "_is_setup", True):
            taskpool.setup()

    def score(self, model: nn.Module, task: str) -> float:
        """The model's accuracy (or the pool's own first figure) on the task."""
        return self.scores(model, task)[0]

    def scores(self, model: nn.Module, task: str) -> tuple[float, float | None]:
        """As :meth:`score`, and the loss where the pool tells one."""
        with only(self.taskpool, [task]):
            found = self.taskpool.evaluate(model)[task]
        told = figure(found)
        if told is None:
            raise ComparisonError(
                f"{type(self.taskpool).__name__} gives no number for {task!r}: {found!r}. A comparison needs an accuracy."
            )
        loss = found.get("loss") if isinstance(found, Mapping) else None
        return told[1], None if loss is None else float(loss)

    def release(self) -> None:
        """Drop the pool's references to the last model."""
        clip = getattr(self.taskpool, "clip_model", None)
        if isinstance(clip, nn.Module) and hasattr(clip, "vision_model"):
            clip.vision_model = nn.Identity()
        for hook in HOOKS:
            method = getattr(self.taskpool, hook, None)
            if hasattr(method, "model"):
                method.model = None
