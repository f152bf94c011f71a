"""What a saved model tells of its merge, held against what edits read of it."""

from ..checkpoint.fields import Field
from ..models.task_settings import TASK_SETTINGS, check_task_settings

#: Facts by task that are of its checkpoint, whatever it is merged with.
OF_CHECKPOINTS = ("parents", "tensors", *TASK_SETTINGS)
#: All facts by task.
BY_TASK = (*OF_CHECKPOINTS, "relative_errors")


def check_info(info: Field) -> None:
    """Facts that edits read must be as they are written; others may be anything.

    Raises:
        CheckpointMismatchError: naming the first that is not.
    """
    for key in ("parents", "tensors"):
        if key in info:
            info[key].mapping()
    check_task_settings(info)
    if "tensors" in info:
        for _, told in info["tensors"].entries():
            told.mapping()
    if "ranks" in info:
        for _, ranks in info["ranks"]["experts"].entries():
            ranks.mapping()
    if "relative_error" in info and info["relative_error"].number() < 0:
        info["relative_error"].fail("a part of the energy")
    if "energy_kept" in info:
        tasks = info["energy_tasks"].texts()
        for _, kept in info["energy_kept"].entries():
            if len(kept.elements()) != len(tasks):
                kept.fail(f"a number for each of {tasks}")
            for part in kept.elements():
                part.number()
    if "edits" in info:
        for edit in info["edits"].elements():
            edit["operation"].text()
