"""Facts of a merge, as edits change them."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..pools.task_settings import TASK_SETTINGS

#: Facts by task that are of its checkpoint, whatever it is merged with.
OF_CHECKPOINTS = ("parents", "tensors", *TASK_SETTINGS)
#: All facts by task.
BY_TASK = (*OF_CHECKPOINTS, "relative_errors", "energies")


def of_tasks(info: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, Any]:
    """Facts without those of tasks that are not among the given ones."""
    info, tasks = dict(info), list(tasks)
    for key in BY_TASK:
        if key in info:
            info[key] = {t: v for t, v in info[key].items() if t in tasks}
    if "ranks" in info:
        experts = {t: v for t, v in info["ranks"]["experts"].items() if t in tasks}
        info["ranks"] = {**info["ranks"], "experts": experts}
    if "energy_tasks" in info:
        left = [(i, t) for i, t in enumerate(info["energy_tasks"]) if t in tasks]
        info["energy_tasks"] = [task for _, task in left]
        info["energy_kept"] = {
            tensor: [kept[i] for i, _ in left]
            for tensor, kept in info["energy_kept"].items()
        }
    return with_error(info, tasks)


def with_tasks(info: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with those that others tell of more tasks; the rest of these is left out."""
    info = dict(info)
    for key in BY_TASK:
        if key in info or key in more:
            info[key] = {**info.get(key, {}), **more.get(key, {})}
    if "ranks" in info:
        experts = info["ranks"]["experts"] | more.get("ranks", {}).get("experts", {})
        info["ranks"] = {**info["ranks"], "experts": experts}
    return info


def with_error(info: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, Any]:
    """Facts with the relative error of these tasks together; without one where that of some task, or its energy, is not known."""
    info = {key: value for key, value in info.items() if key != "relative_error"}
    energies, errors = info.get("energies", {}), info.get("relative_errors", {})
    tasks = list(tasks)
    if all(task in energies and task in errors for task in tasks):
        lost = sum(errors[task] * energies[task] for task in tasks)
        whole = sum(energies[task] for task in tasks)
        info["relative_error"] = lost / max(whole, 1e-300)
    return info
