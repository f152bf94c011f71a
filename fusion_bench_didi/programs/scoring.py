"""One model on one task of any host task pool.

The host evaluates a model on every task of a pool; a comparison wants single tasks, because fine-tuned models are asked
for their own task only, and because a killed run should not repeat what it has.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import spelled
from ..pools.task_names import only, pool_tasks
from ..report.metrics import ACCURACY, falls, figure, is_share
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
        #: what the figures of tasks are, as far as there are some; those to come must be the same
        self.metrics: dict[str, str] = {}
        attach(taskpool, aliases=aliases)
        if not getattr(taskpool, "_is_setup", True):
            taskpool.setup()

    def score(self, model: nn.Module, task: str) -> float:
        """The model's accuracy (or the pool's own first figure of that kind) on the task.

        Raises:
            ComparisonError: if the pool tells none, or one that cannot stand in a table of accuracies.
        """
        return self.scores(model, task)[0]

    def scores(self, model: nn.Module, task: str) -> tuple[float, float | None]:
        """As :meth:`score`, and the loss where the pool tells one."""
        with only(self.taskpool, [task]):
            report = self.taskpool.evaluate(model)
        there = isinstance(report, Mapping) and task in report
        found = report[task] if there else report
        told = figure(found) if there else None
        if told is None:
            raise ComparisonError(
                f"{type(self.taskpool).__name__} gives no number for {task!r}: {found!r:.200}. A comparison needs an accuracy, "
                "so let the pool report {task: {accuracy: number}}."
            )
        self._check(task, *told)
        loss = found.get("loss") if isinstance(found, Mapping) else None
        return told[1], None if loss is None else float(loss)

    def _check(self, task: str, metric: str, value: float) -> None:
        other = self.metrics.get(task, metric)
        out = (
            f"A comparison needs figures within 0 and 1 of which more is better: let the task pool report one as {ACCURACY}, "
            "or leave the task out"
        )
        if other != metric:
            why = f"and there are rows with {other}"
            out = f"Give another directory ({spelled('path.log_dir', '...')}), or {spelled('restart', 'true')} to forget those rows"
        elif falls(metric):
            why = "of which less is better"
        elif not math.isfinite(value):
            why = "which is no number"
            out = "Look at what the model puts out there, or leave the task out"
        elif not is_share(metric, value):
            why = "which is not within 0 and 1"
        else:
            self.metrics[task] = metric
            return
        raise ComparisonError(
            f"{type(self.taskpool).__name__} gives {metric} {value:g} for {task!r}, {why}. {out}."
        )

    def release(self) -> None:
        """Drop the pool's references to the last model."""
        clip = getattr(self.taskpool, "clip_model", None)
        if isinstance(clip, nn.Module) and hasattr(clip, "vision_model"):
            clip.vision_model = nn.Identity()
        for hook in HOOKS:
            method = getattr(self.taskpool, hook, None)
            if hasattr(method, "model"):
                method.model = None
