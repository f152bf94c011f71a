"""The tasks of a pool, spread over ranks: each evaluates some of them, on all of their samples, and gets the figures of all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..distributed.fabrics import fabric_of_one
from ..distributed.ranks import Ranks, by_itself
from ..errors import RankError
from ..pools.task_names import only, pool_tasks
from ..report.comparison import mean

AVERAGE = "average"


def evaluated(
    taskpool: Any,
    evaluate: Callable[..., Any],
    model: nn.Module,
    *args: Any,
    ranks: Ranks,
    spread: bool = True,
    **kwargs: Any,
) -> Any:
    """Figures of a pool for a model, the same on all ranks.

    Args:
        evaluate: of the pool.
        spread: every rank evaluates some of the tasks; else each evaluates all of them.

    Raises:
        RankError: for a pool whose report does not have its tasks.
    """
    if ranks.size == 1:
        return evaluate(model, *args, **kwargs)
    try:
        _by_itself(taskpool)
        with by_itself():
            if getattr(taskpool, "_is_setup", True) is False:
                taskpool.setup()
            tasks = pool_tasks(taskpool)
            if not spread or not tasks:
                return evaluate(model, *args, **kwargs)
            mine, report = tasks[ranks.rank :: ranks.size], None
            if mine:
                with only(taskpool, mine):
                    report = evaluate(model, *args, **kwargs)
                _check(taskpool, report, mine, ranks)
    except BaseException as error:
        ranks.fail(error)
        raise
    return combined(ranks.gather(report), tasks)


def combined(
    reports: Sequence[Mapping[str, Any] | None], tasks: Sequence[str]
) -> dict[str, Any]:
    """One report of all tasks.

    Args:
        reports: of some of the tasks each; None of none.
        tasks: in the order of the pool.
    """
    reports = [report for report in reports if report is not None]
    figures = {task: report[task] for report in reports for task in report}
    about = {k: v for k, v in reports[0].items() if k not in (*tasks, AVERAGE)}
    whole = {**about, **{task: figures[task] for task in tasks}}
    if isinstance(reports[0].get(AVERAGE), Mapping):
        firsts = [list(figures[task].values())[0] for task in tasks]
        whole[AVERAGE] = {
            key: mean([f[key] for f in map(figures.get, tasks) if key in f] or firsts)
            for key in reports[0][AVERAGE]
        }
    return whole


def _by_itself(taskpool: Any) -> None:
    """The pool gets a Fabric of this process alone: that of all would give each of them a part of every task's samples."""
    fabric = getattr(taskpool, "_fabric_instance", None)
    if fabric is not None and fabric.world_size > 1:
        taskpool._fabric_instance = fabric_of_one(fabric)
        if getattr(taskpool, "_is_setup", False):
            taskpool._is_setup = False


def _check(taskpool: Any, report: Any, tasks: Sequence[str], ranks: Ranks) -> None:
    told = report if isinstance(report, Mapping) else {}
    if lacking := [task for task in tasks if not isinstance(told.get(task), Mapping)]:
        raise RankError(
            f"{type(taskpool).__name__} reports no figures of {lacking}, so that its tasks cannot be spread over {ranks.size} "
            "processes. Evaluate on one, with fabric.devices=1 and ++fabric.num_nodes=1."
        )
