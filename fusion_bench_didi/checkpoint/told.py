"""What a manifest tells beside its weights: tasks, the account of storage, and facts of the merge, held against what reads them."""

from collections.abc import Callable, Mapping
from typing import Any

from ..pools.carried import CARRIED, fits
from ..pools.task_settings import CONFIGURATION, GENERATION, LABELS
from .fields import Field

Check = Callable[[Field], object]


def check_told(manifest: Field) -> None:
    """What pages, edits and saving read of a manifest must be as it is written, where it is there; other facts may be anything.

    Raises:
        CheckpointMismatchError: naming the first field that is not.
    """
    _check_those(_PARTS, manifest)


def check_of_task(info: Field) -> None:
    """The same for facts of one task alone, as a library has them.

    Raises:
        CheckpointMismatchError: naming the first field that is not.
    """
    _check_those(_OF_TASK, info)


def _check_those(checks: Mapping[str, Check], found: Field) -> None:
    for key, check in checks.items():
        if key in found:
            check(found[key])


def _by_name(check: Check) -> Check:
    return lambda found: [check(one) for _, one in found.entries()]


def _each(check: Check) -> Check:
    return lambda found: [check(one) for one in found.elements()]


def _unless(*values: Any, check: Check) -> Check:
    return lambda found: found.value in values or check(found)


def _part(part: Field) -> None:
    if part.number() < 0:
        part.fail("at least 0")


def _labels(labels: Field) -> None:
    values = dict(labels.entries())
    for name in values.values():
        name.text()
    if values.keys() != set(map(str, range(len(values)))):
        labels.fail("names of classes counted from 0")


def _configuration(settings: Field) -> None:
    for key, value in settings.entries():
        if key.rpartition(".")[2] not in CARRIED:
            value.fail(f"nothing: {key} is none of the settings that tasks have")
        if not fits(key, value.value):
            value.fail("what that setting may be")


def _ranks(ranks: Field) -> None:
    of_tensors = _by_name(Field.integer)
    of_tensors(ranks["shared"])
    _by_name(of_tensors)(ranks["experts"])


def _info(info: Field) -> None:
    _check_those(_FACTS, info)
    if "energy_kept" in info:
        tasks = info["energy_tasks"].texts()
        for _, kept in info["energy_kept"].entries():
            if len(kept.elements()) != len(tasks):
                kept.fail(f"a number for each of {tasks}")
            _each(Field.number)(kept)


def _account(storage: Field) -> None:
    storage["unit_bits"].integer(1)
    for key in ("shared_bits", "routing_bits"):
        storage[key].integer()
    _by_name(Field.integer)(storage["expert_bits"])
    for key in ("x_excl", "x_incl"):
        storage[key].number()


#: facts of a task's checkpoint
_OF_TASK: dict[str, Check] = {
    "parents": _unless(None, check=Field.text),
    "tensors": Field.mapping,
    LABELS: _labels,
    GENERATION: lambda told: list(told.entries()),
    CONFIGURATION: _configuration,
}
_FACTS: dict[str, Check] = {
    **{key: _by_name(check) for key, check in _OF_TASK.items()},
    "method": Field.text,
    "settings": Field.mapping,
    "budget": _unless(None, "inf", check=Field.number),
    "relative_error": _part,
    "relative_errors": _by_name(_part),
    "energies": _by_name(_part),
    "ranks": _ranks,
    "precision": _by_name(Field.text),
    "forms": _by_name(Field.text),
    "energy_tasks": Field.texts,
    "edits": _each(lambda edit: edit["operation"].text()),
}
_PARTS: dict[str, Check] = {
    "tasks": Field.texts,
    "experts": _each(lambda expert: expert["task"].text()),
    "storage": _account,
    "info": _info,
    "router": lambda router: router["kind"].text(),
    "versions": Field.mapping,
}
