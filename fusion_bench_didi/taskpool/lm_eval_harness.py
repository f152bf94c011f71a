"""The host's pool of lm-eval's tasks, one task after the other.

lm-eval gathers the requests of all its tasks before it runs any, and the host's pool returns nothing. Here every task, or group
of tasks, is a run of its own under its expert, and its figures come back as those of other pools do.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion_bench.constants import RuntimeConstants
from torch import nn

from ..errors import DiDiError
from ..models.pool_saving import run_directory
from ..pools.task_names import pool_tasks


def lm_eval_pool(**settings: Any) -> Any:
    """The host's pool of lm-eval's tasks.

    Args:
        **settings: the host pool's arguments.

    Raises:
        DiDiError: if lm-eval is not there, or in a version that the host's pool does not take.
    """
    try:
        from fusion_bench.taskpool.lm_eval_harness import LMEvalHarnessTaskPool
    except ImportError as error:
        raise DiDiError(
            f"Tasks of lm-eval need lm-eval, in a version that FusionBench takes ({error}): "
            "pip install 'fusion-bench-didi[lm-eval]'."
        ) from error
    return LMEvalHarnessTaskPool(**settings)


def is_harness(taskpool: Any) -> bool:
    """Whether a pool is the host's lm-eval pool; looked up by name, as lm-eval may not be installed."""
    names = {cls.__name__ for cls in type(taskpool).__mro__}
    return "LMEvalHarnessTaskPool" in names


def task_by_task(
    taskpool: Any, evaluate: Callable, tell: Callable[[nn.Module, str], None]
) -> Callable:
    """The pool's ``evaluate`` with a report: figures per task, and the average of their first ones.

    Args:
        tell: makes a model that of a task.
    """

    @functools.wraps(evaluate)
    def wrapper(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        report: dict[str, Any] = {}
        if RuntimeConstants().debug:  # a rehearsal: one batch of each task
            size = taskpool.batch_size
            kwargs.setdefault("limit", size if isinstance(size, int) else 1)
        for task in pool_tasks(taskpool):
            tell(model, task)
            with _only(taskpool, task) as place:
                evaluate(model, *args, **kwargs)
            report[task] = _figures(place, task)
        firsts = [next(iter(found.values())) for found in report.values()]
        report["average"] = {"figure": sum(firsts) / len(firsts)}
        return report

    wrapper.__self__ = taskpool
    return wrapper


@contextmanager
def _only(taskpool: Any, task: str) -> Iterator[Path]:
    """The pool with one task and a directory for its results."""
    asked = taskpool.tasks, taskpool.output_path
    run = taskpool.log_dir or run_directory(taskpool._program)
    if not (asked[1] or run):
        raise DiDiError(
            "lm-eval writes its figures to files, and the run has no directory. Give taskpool.output_path."
        )
    whole = Path(asked[1]) if asked[1] else Path(run) / "lm_eval_results"
    place = whole / task.replace("/", "_")
    taskpool.tasks, taskpool.output_path = [task], str(place)
    try:
        yield place
    finally:
        taskpool.tasks, taskpool.output_path = asked


def _figures(place: Path, task: str) -> dict[str, float]:
    """Figures that lm-eval wrote last; of a group without figures of its own, the mean over its tasks."""
    files = sorted(place.rglob("results_*.json"), key=lambda f: f.stat().st_mtime)
    written = json.loads(files[-1].read_text()) if files else {"results": {}}
    results = written["results"]
    own = _plain(results.get(task, {}))
    if own:
        return own
    parts = [found for name in results if (found := _plain(results[name]))]
    if not parts:
        raise DiDiError(
            f"lm-eval gave no figures for {task!r} in {place}, expected results of one task or group. Look at its log."
        )
    return {
        key: sum(part[key] for part in parts) / len(parts)
        for key in parts[0]
        if all(key in part for part in parts)
    }


def _plain(results: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none`` as ``acc``; errors of the mean and texts left out."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in results.items()
        if "_stderr" not in key and type(value) in (int, float)
    }
