"""When two task names mean the same task.

The rule, first match wins: what the user's map says (``method.task_aliases``: task pool name -> model name); the same
string; equal in lower case with ``-`` and ``/`` as ``_`` and without ``glue_`` in front.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import ListConfig

from ..errors import UnknownTaskError, spelled


def normalized(name: str) -> str:
    return name.lower().replace("-", "_").replace("/", "_").removeprefix("glue_")


def resolve_task(
    name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None
) -> str:
    """The known task that ``name`` means.

    Raises:
        UnknownTaskError: naming what was asked for and what there is.
    """
    known = list(known)
    found = _meant(name, known, aliases)
    if found is None:
        raise UnknownTaskError(
            f"Task {(aliases or {}).get(name, name)!r} is not in the merged model, which holds {known}. "
            f"Map it with {spelled('task_aliases', '{pool_name: model_name}')}, or take it out of the task pool."
        )
    return found


def _meant(
    name: str, known: Collection[str], aliases: Mapping[str, str] | None = None
) -> str | None:
    """The known task that a name means; None if there is none, or more than one."""
    name = (aliases or {}).get(name, name)
    if name in known:
        return name
    same = [task for task in known if normalized(task) == normalized(name)]
    return same[0] if len(same) == 1 else None


def check_tasks(
    asked: Iterable[str], known: Iterable[str], aliases: Mapping[str, str] | None = None
) -> None:
    """Every task of a task pool must be known.

    Raises:
        UnknownTaskError: naming both lists.
    """
    asked, known = list(asked), list(known)
    if unknown := [name for name in asked if _meant(name, known, aliases) is None]:
        raise UnknownTaskError(
            f"The task pool has tasks that no merged model covers: {unknown}. Task pool: {asked}; models: {known}. "
            f"Map names with {spelled('task_aliases', '{pool_name: model_name}')}, or take these tasks out of the task pool."
        )


def check_aliases(aliases: Mapping[str, str] | None, known: Iterable[str]) -> None:
    """Every alias must mean a model.

    Raises:
        UnknownTaskError: naming those that do not.
    """
    known, aliases = list(known), aliases or {}
    if unknown := {n: m for n, m in aliases.items() if _meant(m, known) is None}:
        raise UnknownTaskError(
            f"{spelled('task_aliases', str(unknown))} names no model of the pool, which has {known}. Map task pool names to model names."
        )


def names_of(
    models: Iterable[str],
    given: Iterable[str],
    aliases: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The name that a pool gives the task of every model, by model name; models without one are left out.

    Args:
        given: names of a pool's tasks or datasets, those of other tasks among them.
    """
    models, found = list(models), {}
    for name in given:
        found.setdefault(_meant(name, models, aliases), name)
    found.pop(None, None)
    return found


#: Where the host's pools keep their tasks, mappings or lists of names.
TASKS = (
    *("test_dataloaders", "_test_datasets", "test_datasets"),
    *("_tasks", "_all_task_names", "tasks"),
)


def pool_tasks(taskpool: Any) -> list[str]:
    """The names of the tasks that a host pool will evaluate; empty if it does not tell."""
    for attribute in TASKS[1:]:
        value = getattr(taskpool, attribute, None)
        if isinstance(value, (str, list, tuple, ListConfig)) or hasattr(value, "keys"):
            return _names(value)
    return []


@contextmanager
def only(taskpool: Any, tasks: Collection[str]) -> Iterator[None]:
    """While the block runs, a host pool has some of its tasks."""
    held = vars(taskpool)
    stock = {n: held[n] for n in TASKS if set(tasks) <= set(_names(held.get(n)))}
    try:
        for name, value in stock.items():
            some = [task for task in _names(value) if task in tasks]
            mapping = hasattr(value, "keys")
            chosen = {task: value[task] for task in some} if mapping else some
            setattr(taskpool, name, chosen)
        yield
    finally:
        for name, value in stock.items():
            setattr(taskpool, name, value)


def _names(value: Any) -> list[str]:
    """Names that a pool iterates over."""
    if isinstance(value, str):
        return value.split(",")
    return [str(name) for name in value] if isinstance(value, Iterable) else []
