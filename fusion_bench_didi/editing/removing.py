"""Taking a task out of a merged model; the others stay as they are, to the bit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DiDiError
from .facts import BY_TASK
from .places import Edited, Place, in_place
from .stored import Stored, check_known


def remove_task(
    place: Place,
    name: str,
    *,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    drop_router: bool = False,
) -> Edited:
    """Drop one expert, and what then serves nobody.

    Args:
        place: a model, which is changed, or the directory of one.
        output_dir: where to write; the directory itself if None and ``overwrite`` is set.
        drop_router: take off a router, which knows the task.

    Raises:
        UnknownTaskError: if there is no such task.
        DiDiError: for the only task, or a router.
        FileExistsError, SettingsError, CheckpointMismatchError: before anything is changed.
    """
    return in_place(
        place,
        lambda stored: without(stored, name),
        output_dir=output_dir,
        overwrite=overwrite,
        drop_router=drop_router,
    )


def without(stored: Stored, name: str) -> Stored:
    """The stored model without one task; shared parts that only it used are gone too."""
    check_known([name], stored.tasks, "The merged model")
    if len(stored.tasks) == 1:
        raise DiDiError(
            f"{name!r} is the only task of the merged model, which would be nothing but its backbone then. Delete the model."
        )
    experts = {t: deltas for t, deltas in stored.experts.items() if t != name}
    left = replace(stored, experts=experts, routing_bits=0).useful()
    freed = stored.storage.excl_bits - left.storage.excl_bits
    left = replace(left, info=_forgotten(stored.info, name))
    return left.edited(
        "remove",
        task=name,
        freed_bits=freed,
        unshared=sorted(set(stored.shared) - set(left.shared)),
    )


def _forgotten(info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Facts about the merge without those of one task."""
    info = dict(info)
    for key in BY_TASK:
        if key in info:
            info[key] = {t: v for t, v in info[key].items() if t != name}
    if "ranks" in info:
        experts = {t: v for t, v in info["ranks"]["experts"].items() if t != name}
        info["ranks"] = {**info["ranks"], "experts": experts}
    order = info.get("energy_tasks", [])
    if name in order:
        t = order.index(name)
        info["energy_tasks"] = [task for task in order if task != name]
        info["energy_kept"] = {
            tensor: [*kept[:t], *kept[t + 1 :]]
            for tensor, kept in info["energy_kept"].items()
        }
    return info
