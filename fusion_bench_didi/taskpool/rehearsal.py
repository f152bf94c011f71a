"""Rehearsals: ``fast_dev_run=true`` of a program, after which every task is evaluated on one batch."""

from collections.abc import Mapping
from typing import Any

from fusion_bench.constants import RuntimeConstants

from ..errors import SettingsError, spelled
from .lm_eval_harness import is_harness

#: The host's pools that ask the program alone.
_ASKING = ("ImageClassificationTaskPool", "ResNetForImageClassificationTaskPool")


def rehearses(own: bool | None) -> bool:
    """Whether a pool evaluates one batch per task: as its own setting says, and the program's where it has none."""
    return RuntimeConstants().debug if own is None else own


def check_rehearsal(taskpool: Any, config: Mapping[str, Any]) -> None:
    """In a rehearsal a pool must evaluate one batch per task.

    Args:
        config: of the pool.

    Raises:
        SettingsError: naming a pool that evaluates everything.
    """
    if not RuntimeConstants().debug or is_harness(taskpool):
        return
    names = {cls.__name__ for cls in type(taskpool).__mro__}
    own = getattr(taskpool, "fast_dev_run", config.get("fast_dev_run"))
    if own or names.intersection(_ASKING):
        return
    way = "Leave fast_dev_run out"
    if own is not None:
        added = "" if "fast_dev_run" in config else "+"
        way += f", or set {added}{spelled('taskpool.fast_dev_run', 'true')} too"
    raise SettingsError(
        f"fast_dev_run=true is one batch per task, and {type(taskpool).__name__} would evaluate everything. {way}."
    )
