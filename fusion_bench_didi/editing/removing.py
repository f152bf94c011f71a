"""Taking a task out of a merged model; the others stay as they are, to the bit."""

from dataclasses import replace
from pathlib import Path

from ..errors import DiDiError
from .facts import of_tasks
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
    left = replace(left, info=of_tasks(stored.info, left.tasks))
    return left.edited(
        "remove",
        task=name,
        freed_bits=freed,
        unshared=sorted(set(stored.shared) - set(left.shared)),
    )
