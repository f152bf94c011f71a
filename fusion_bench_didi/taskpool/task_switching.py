"""How a dynamic model learns which task is being evaluated.

The released host has no such signal, but its program builds the task pool before the method runs, and every pool calls one
method per task with the task's name. :func:`attach` wraps that method on the *instance*, so that unmodified stock pools
evaluate any model with ``set_task`` (ours and the host's EMR) on the right expert. A host whose pools switch tasks themselves
(``upstream/task_aware_evaluation``) calls ``set_task`` of the pool instead: nothing is wrapped then, only our rule of names
and our routers are put in its place.
"""

import functools
import logging
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

from torch import nn

from ..distributed.ranks import ranks_here
from ..errors import DiDiError
from ..models.dynamic import DynamicModel
from ..options import Aliases
from ..pools.task_names import (
    check_tasks,
    normalized,
    only,
    pool_tasks,
    resolve_task,
)
from .lm_eval_harness import is_harness, task_by_task
from .loading import check_loading
from .over_ranks import combined, evaluated

log = logging.getLogger(__name__)

#: per-task methods of the host's pools, in the order in which they are looked for
HOOKS = ("on_task_evaluation_begin", "evaluate_single_task", "load_task", "_evaluate")
_ALIASES = "_didi_aliases"


def attach(
    taskpool: Any,
    *,
    known: list[str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Make a task pool tell dynamic models their task before each evaluation, and report their storage.

    Models without ``set_task`` are evaluated as before. Attaching again only adds aliases.

    Args:
        taskpool: a host task pool.
        known: tasks of the model to come; checked at once if given, and again for every model evaluated.
        aliases: task pool name -> model name.

    Raises:
        UnknownTaskError: naming both lists, if the pool has a task that the model lacks.
    """
    tasks = pool_tasks(taskpool)
    if known is not None and tasks:
        check_tasks(tasks, known, aliases_of(taskpool, aliases))
    attached = getattr(taskpool, _ALIASES, None)
    if attached is not None:
        attached.update(aliases or {})
        return
    aliases = aliases_of(taskpool, aliases)
    setattr(taskpool, _ALIASES, aliases)
    hook = hook_name(taskpool)
    if switches_tasks(taskpool):
        taskpool.set_task = _switching(taskpool.set_task, aliases)
    elif hook is not None:
        setattr(taskpool, hook, _telling(taskpool, getattr(taskpool, hook), aliases))
    elif is_harness(taskpool):
        tell = functools.partial(_tell, aliases=aliases)
        taskpool.evaluate = task_by_task(taskpool, taskpool.evaluate, tell)
    elif tasks and callable(getattr(taskpool, "evaluate", None)):
        taskpool.evaluate = _one_by_one(taskpool, taskpool.evaluate, aliases)
    else:
        log.warning(
            "%s has no per-task method (%s), and no tasks (an attribute with their names): a dynamic model must be given its task by "
            "hand.",
            type(taskpool).__name__,
            ", ".join(HOOKS),
        )
    if callable(getattr(taskpool, "evaluate", None)):
        taskpool.evaluate = _reporting(taskpool.evaluate, tasks, aliases)


def aliases_of(taskpool: Any, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Task pool name -> model name, of a pool's own setting, what was attached to it, and what a method is given."""
    own = (getattr(taskpool, key, None) or {} for key in ("task_aliases", _ALIASES))
    return {name: model for part in (*own, given or {}) for name, model in part.items()}


def check_switching(taskpool: Any) -> None:
    """A pool of the host's that runs models must be one that can be made to tell them their task.

    Raises:
        DiDiError: if it evaluates everything at once.
    """
    kind = type(taskpool)
    stock = kind.__module__.partition(".")[0] == "fusion_bench"
    if not stock or kind.__name__ == "DummyTaskPool" or is_harness(taskpool):
        return
    if hook_name(taskpool) is None and not switches_tasks(taskpool):
        raise DiDiError(
            f"{kind.__name__} runs a model without saying on which task, so no expert could be chosen. Evaluate by another task "
            "pool (those of the host that go task by task, or of fusion_bench_didi.taskpool), by taskpool=dummy and by hand, or "
            "let a router find the task: method=didi/routed."
        )


def switches_tasks(taskpool: Any) -> bool:
    """Whether a pool calls its own ``set_task(model, task_name)`` before each task."""
    return getattr(taskpool, "switches_tasks", False) is True


def hook_name(taskpool: Any) -> str | None:
    """The per-task method of a pool, None where it has none."""
    return next((h for h in HOOKS if callable(getattr(taskpool, h, None))), None)


class TaskAware:
    """A mixin that makes the next base class, a host task pool, task-aware.

    Args:
        task_aliases: task pool name -> model name, for names that the naming rule does not match.
        **kwargs: the host pool's arguments.
    """

    def __init__(self, *args: Any, task_aliases: Aliases = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_loading(self)
        attach(self, aliases=task_aliases)


def _switching(stock, aliases):
    """The host's hook, by our rule of names; what is none of the models that we know is the host's."""

    @functools.wraps(stock)
    def set_task(model, task_name):
        if dynamic_model_in(model) is None:
            return stock(model, task_name)
        _tell(model, task_name, aliases)
        return True

    return set_task


def _telling(taskpool, method, aliases):
    """Call ``set_task`` on the dynamic model among the arguments, then the method."""

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        values = (*args, *kwargs.values())
        model = next(filter(None, map(dynamic_model_in, values)), None)
        if model is None:
            model = wrapper.model
        if model is not None:
            named = {**signature(method).bind(*args, **kwargs).arguments, **kwargs}
            asked, known = pool_tasks(taskpool), list(model.modulators)
            name = _task_among(named, values, [*asked, *known, *aliases])
            if name is None and len(asked) == 1:
                (name,) = asked
            if name is not None:
                _tell(model, name, aliases)
        return method(*args, **kwargs)

    wrapper.model = None
    return wrapper


def _task_among(
    named: Mapping[str, Any], values: Iterable[Any], known: Iterable[str]
) -> str | None:
    """The task among the arguments of a per-task method: what is called so, else what is one, else the first text."""
    for key in ("task_name", "task"):
        if isinstance(named.get(key), str):
            return named[key]
    texts = [value for value in values if isinstance(value, str)]
    tasks = {normalized(name) for name in known}
    return next((t for t in texts if normalized(t) in tasks), next(iter(texts), None))


def _one_by_one(taskpool, evaluate, aliases):
    """A pool without a per-task method evaluates a dynamic model on one task after the other."""

    @functools.wraps(evaluate)
    def wrapper(model, *args, **kwargs):
        dynamic, tasks = dynamic_model_in(model), pool_tasks(taskpool)
        if dynamic is None or _routes(dynamic):
            return evaluate(model, *args, **kwargs)
        reports = []
        for task in tasks:
            _tell(model, task, aliases)
            with only(taskpool, [task]):
                report = evaluate(model, *args, **kwargs)
            if len(tasks) == 1:
                return report
            if not isinstance(report, Mapping) or task not in report:
                raise DiDiError(
                    f"{type(taskpool).__name__} has no per-task method ({', '.join(HOOKS)}), and asked for {task!r} alone it does not "
                    f"report its figures: {report!r:.200}. Give it such a method, or let it call set_task of the model."
                )
            reports.append(
                {k: v for k, v in report.items() if k not in tasks or k == task}
            )
        return combined(reports, tasks)

    wrapper.__self__ = taskpool
    return wrapper


def _tell(model: nn.Module, name: str, aliases: Mapping[str, str]) -> None:
    """Make the dynamic model in a model that of a task; others, and those that route, are left as they are."""
    dynamic = dynamic_model_in(model)
    if dynamic is not None and not _routes(dynamic):
        dynamic.set_task(resolve_task(name, dynamic.modulators, aliases))


def _reporting(evaluate, tasks: list[str], aliases):
    """Check names before, add the account after."""

    @functools.wraps(evaluate)
    def wrapper(model, *args, **kwargs):
        dynamic = dynamic_model_in(model)
        if dynamic is not None:
            check_tasks(tasks, dynamic.modulators, aliases)
        routed = routes_anew(dynamic)
        hook = _hook_of(evaluate.__self__)
        try:
            if hook is not None:
                hook.model = dynamic
            report = evaluated(
                evaluate.__self__,
                evaluate,
                model,
                *args,
                ranks=ranks_here(),
                spread=not routed,
                **kwargs,
            )
        finally:
            if hook is not None:
                hook.model = None  # kept, it would outlive its evaluation
        if isinstance(dynamic, DynamicModel) and isinstance(report, dict):
            report["didi"] = told_of(dynamic)
            if routed:
                report["didi"]["router"] = dynamic.router.report()
        return report

    return wrapper


def told_of(model: DynamicModel) -> dict[str, Any]:
    """Storage of a model and how it came about, without empty lists: the host's printer of reports fails on them."""

    def printable(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {k: printable(v) for k, v in value.items() if v != [] and v != ()}

    return printable({"storage": model.storage.as_dict(), **model.info})


def _hook_of(taskpool: Any) -> Any:
    """The wrapped per-task method of a pool, None where it has none."""
    methods = (getattr(taskpool, hook, None) for hook in HOOKS)
    return next((method for method in methods if hasattr(method, "model")), None)


def _routes(model: nn.Module | None) -> bool:
    """Whether the model finds each sample's task by itself."""
    return isinstance(model, DynamicModel) and model.router is not None


def routes_anew(model: nn.Module | None) -> bool:
    """Whether a model routes; what its router has seen is forgotten then."""
    if routes := _routes(model):
        model.unset_task()
        model.router.reset()
    return routes


def dynamic_model_in(value: Any) -> nn.Module | None:
    """The model with ``set_task`` and ``modulators`` inside a module, a classifier or a Fabric wrapper."""
    if not isinstance(value, nn.Module):
        return None
    for module in value.modules():
        if hasattr(type(module), "set_task") and hasattr(module, "modulators"):
            return module
    return None
