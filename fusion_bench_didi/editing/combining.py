"""Two merged models of one base model as one: the tasks of both, every output as it was.

Where both share the same of a tensor, the tasks go on sharing it. Where they do not, what the second model shares is kept apart,
for its tasks as a group (``deltas/grouped.py``), stored and held once.
"""

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import backbone as backbones
from ..checkpoint.deltas import read_config
from ..deltas.base import Delta
from ..deltas.grouped import GroupedDelta, groups_of
from ..deltas.plain import OwnDelta
from ..deltas.tucker import Bases
from ..errors import CheckpointMismatchError, DiDiError, SettingsError, some
from ..files import from_home
from ..lowrank.arithmetic import own_arithmetic
from ..models.dynamic import DynamicModel
from ..pools.task_names import normalized
from .facts import with_error, with_tasks
from .places import (
    Edited,
    Place,
    check_router_goes,
    edited_model,
    stored_of,
    target_of,
    written,
)
from .stored import Stored

#: Facts of one merge that are none of two.
_OF_ONE = (
    *("budget", "relative_error", "energy_kept", "energy_tasks"),
    *("precision", "forms", "subspaces", "seconds"),
)


def combine(
    first: Place,
    second: Place,
    *,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    drop_router: bool = False,
) -> Edited:
    """The tasks of two merged models of one base model.

    Args:
        first: a model, which then holds the tasks of both, or the directory of one.
        second: another model, which stays as it is, or directory.
        output_dir: where to write; the first directory if None and ``overwrite`` is set.
        drop_router: leave routers behind, which do not know the tasks of the other model.

    Raises:
        DiDiError: for tasks of one name, or a router.
        CheckpointMismatchError: if the base models are not the same.
        FileExistsError, SettingsError: before anything is changed.
    """
    with target_of(first, output_dir, overwrite=overwrite) as target:
        live = [isinstance(place, DynamicModel) for place in (first, second)]
        if all(live):
            if second.router is not None:
                check_router_goes(drop_router, "The second model")
            other = Stored.of(second)
            check_names(Stored.of(first), other)
            _check_backbones(first, second)

            def edit(stored: Stored) -> Stored:
                # deltas of a model go where that model goes
                shared, experts = copy.deepcopy((other.shared, other.experts))
                return combined(stored, replace(other, shared=shared, experts=experts))

            return edited_model(first, edit, target, drop_router)
        if any(live):
            raise SettingsError(
                "A model in memory and a directory are given. Load the directory, or save the model, and give two of a kind."
            )
        places = from_home(first), from_home(second)
        configs = [read_config(place) for place in places]
        for place, config in zip(places, configs):
            if "router" in config:
                check_router_goes(drop_router, str(place))
        entry = configs[0]["backbone"]
        beside, spell = backbones.spelled_beside(configs[1]["backbone"], entry)
        check_entries(entry, beside, names=places)
        before, other = map(stored_of, places, configs)
        after = combined(before, other.spelled(spell)).of_directories(*places)
        digests = {**beside["tensors"], **entry["tensors"]}
        config = {**configs[0], "backbone": {**entry, "tensors": digests}}
        return written(target, before, after, config)


@own_arithmetic()
def combined(first: Stored, second: Stored) -> Stored:
    """Deltas of both models; shared parts of the second that the first does not have are kept apart."""
    check_names(first, second)
    labels = _labels(first, second)
    shared = dict(first.shared)
    apart = set()
    for name in (*first.shared, *second.shared):
        one, other = first.shared.get(name), second.shared.get(name)
        if one is None and isinstance(other, Bases):
            shared[name] = other  # they are nothing to the tasks of the first
        elif not (isinstance(one, Bases) and other is None) and not same(one, other):
            apart.add(name)
    experts = {
        task: _beside(deltas, second.shared, labels[task], apart, first.shared)
        for task, deltas in second.experts.items()
    }
    info = {key: fact for key, fact in first.info.items() if key not in _OF_ONE}
    info = with_tasks(info, second.info)
    after = replace(
        first,
        shared=shared,
        experts={**first.experts, **experts},
        unit_bits=max(first.unit_bits, second.unit_bits),
        backbone_bits=max(first.backbone_bits, second.backbone_bits),
        info=with_error(info, [*first.tasks, *second.tasks]),
        routing_bits=0,
    ).useful()
    return after.edited(
        "combine",
        first=first.tasks,
        second=second.tasks,
        methods=[s.info.get("method") for s in (first, second)],
        apart=sorted(apart),
    )


def _beside(
    deltas: Mapping[str, Delta],
    shared: Mapping[str, Delta],
    label: str,
    apart: Iterable[str],
    instead: Mapping[str, Delta],
) -> dict[str, Delta]:
    """A task's deltas where the model shares something else than before, in a group with that label."""
    found = dict(deltas)
    for name, delta in deltas.items():
        if isinstance(delta, GroupedDelta):
            found[name] = GroupedDelta(delta.shape, label, delta.common, delta.inner)
    for name in apart:
        delta, common = deltas.get(name), shared.get(name)
        if isinstance(delta, (OwnDelta, GroupedDelta)):
            continue
        known = next(d for d in (delta, common, instead.get(name)) if d is not None)
        found[name] = GroupedDelta(known.shape, label, common, delta)
    return found


def _labels(first: Stored, second: Stored) -> dict[str, str]:
    """Labels of groups for the tasks of the second model, none of which the first has; tasks of one group stay in one."""
    taken = groups_of(first.experts)
    fresh = (str(i) for i in itertools.count(1) if str(i) not in taken)
    labels = dict.fromkeys(second.tasks, next(fresh))
    for group in groups_of(second.experts).values():
        labels |= dict.fromkeys(group["tasks"], next(fresh))
    return labels


@torch.no_grad()
def same(one: Delta | None, other: Delta | None) -> bool:
    """Whether two deltas are stored alike, to the bit."""
    if one is None or other is None:
        return one is other
    forms = [(d.kind, d.shape, d.options(), d.tensors().keys()) for d in (one, other)]
    mine, theirs = one.tensors(), other.tensors()
    return forms[0] == forms[1] and all(
        mine[part].dtype == value.dtype and mine[part].equal(value)
        for part, value in theirs.items()
    )


def check_names(first: Stored, second: Stored) -> None:
    """No two tasks may be called alike.

    Raises:
        DiDiError: naming those that are.
    """
    known = {normalized(task): task for task in first.tasks}
    twins = [(known.get(normalized(task)), task) for task in second.tasks]
    both = [f"{one!r} and {other!r}" for one, other in twins if one is not None]
    if both:
        raise DiDiError(
            f"Both models have tasks of one name: {', '.join(both)}. Remove them from one of the models first."
        )


def check_entries(
    one: Mapping[str, Any], other: Mapping[str, Any], *, names: Iterable[Any]
) -> None:
    """Two saved models must be of one base model, by the digests of its tensors, and in one data type.

    Raises:
        CheckpointMismatchError: naming tensors or settings that differ, or the types.
    """
    mine, theirs = one.get("tensors", {}), other.get("tensors", {})
    both = mine.keys() & theirs.keys()
    differ = sorted(name for name in both if mine[name] != theirs[name])
    untied = set(one.get("untied", ())) ^ set(other.get("untied", ()))
    if one["class"] != other["class"] or not both or differ or untied:
        what = f"its tensors differ ({some(differ or untied)})"
        if one["class"] != other["class"]:
            what = f"one is a {one['class']}, the other a {other['class']}"
        elif not both:
            what = "no tensor of one has the name of one of the other"
        raise _other_base(what, *names)
    if otherwise := backbones.differing_computation(one, other):
        raise _other_base(f"it computes something else ({some(otherwise)})", *names)
    _check_types(one.get("dtype"), other.get("dtype"), *names)


def _check_types(one: Any, other: Any, *names: Any) -> None:
    """The same values in another type give tasks that are rounded otherwise."""
    if one != other:
        types = (str(dtype).removeprefix("torch.") for dtype in (one, other))
        raise _other_base("one has it in {}, the other in {}".format(*types), *names)


def _check_backbones(first: DynamicModel, second: DynamicModel) -> None:
    """Check that two models in memory have one base model, whatever tasks they are switched to."""
    names = "the first model", "the second"
    mine, theirs = map(_base_of, (first, second))
    replaced = _replaced(first) & _replaced(second)
    there = sorted((mine.keys() | theirs.keys()) - replaced)
    both = mine.keys() & theirs.keys()
    differ = [
        name
        for name in there
        if name not in both
        or not mine[name].cpu().equal(theirs[name].to(mine[name].dtype).cpu())
    ]
    if differ:
        raise _other_base(f"its tensors differ ({some(differ)})", *names)
    for name in there:
        _check_types(mine[name].dtype, theirs[name].dtype, *names)


def _replaced(model: DynamicModel) -> set[str]:
    """Tensors that every task has as its own, or that the base model's checkpoint does not hold."""
    fresh = model.info.get("backbone", {}).get("fresh") or ()
    return {*fresh, *(set(model.touched) - set(model.base_tensors()))}


def _base_of(model: DynamicModel) -> dict[str, torch.Tensor]:
    """The base model's tensors by its own names."""
    start = "backbone."
    named = model.state_dict().items()
    return {n.removeprefix(start): v for n, v in named if n.startswith(start)}


def _other_base(what: str, first: Any, second: Any) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{first} and {second} are not of one base model: {what}. Combine models that were merged on the same one, in one data type."
    )
