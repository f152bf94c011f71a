"""The manifest of a merged model: every stored delta by kind, shape and place, and the SHA-256 of every weight file.

Nothing is parsed out of tensor names, and nothing is read or made room for before the manifest was held against the headers
of the files: a damaged file is refused. Files of format 1 have no checksum and are read as they are.
"""

from collections.abc import Callable, Container, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..deltas.base import Delta
from ..deltas.grouped import GroupedDelta
from ..deltas.kinds import KINDS
from ..deltas.names import escaped
from ..deltas.plain import OwnDelta
from ..errors import CheckpointMismatchError, DiDiError
from ..files import MARK, from_home
from .directory import write_json
from .fields import CHECKSUM, Field, read_object, sealed
from .ours import CONFIG
from .parts import (
    FORMS,
    NEVER_OF_A_TASK,
    NEVER_SHARED,
    Entry,
    check_content,
    check_parts,
    check_together,
    options_of,
    read_header,
)
from .tensors import open_tensors
from .told import check_told

#: what is written; all from 1 on are read
FORMAT = 2
#: of models some of whose tasks share what others do not: ``groups`` has by label their ``tasks``, and the ``tensors`` concerned
GROUPED = 3


def entry_of(
    task: str | None, name: str, delta: Delta, group: str | None = None
) -> dict[str, Any]:
    """A delta in the manifest; its tensors are found under ``key`` and the name of the part.

    Args:
        task: None for what tasks share.
        group: of the tasks that share it; of all if None.
    """
    owner = "shared" if task is None else f"experts/{_segment(task)}"
    owner = owner if group is None else f"groups/{_segment(group)}"
    without = [part for part in delta.parts if getattr(delta, part) is None]
    return {
        "task": task,
        "tensor": name,
        "kind": delta.kind,
        "shape": list(delta.shape),
        "key": f"{owner}/{_segment(name)}",
        "options": delta.options(),
        **({"without": without} if without else {}),
        **({} if group is None else {"group": group}),
    }


def _segment(name: str) -> str:
    """A name without slashes, so that no two keys are written alike; its dots stay."""
    return escaped(name).replace("/", ".")


def entries_of(manifest: Field) -> list[Entry]:
    """The deltas of a manifest.

    Raises:
        CheckpointMismatchError: for a field that is not as written, a delta that is there twice or of no task.
    """
    tasks, entries = manifest["tasks"].texts(), []
    groups = _groups(manifest, tasks)
    places: set[tuple[str | None, str | None, str]] = set()
    keys: set[str] = set()
    for field in manifest["deltas"].elements():
        task, tensor, key = field["task"], field["tensor"].text(), field["key"].text()
        owner = None if task.value is None else task.one_of(tasks)
        group = field["group"].one_of(groups) if "group" in field else None
        if group is not None:
            if owner is not None or tensor not in groups[group]["tensors"]:
                field.fail("what a group shares of one of its tensors")
        if (owner, group, tensor) in places or key in keys:
            field.fail("every tensor of a task once, under a key of its own")
        places.add((owner, group, tensor))
        keys.add(key)
        entries.append(_entry(field, owner, group, tensor, key))
    return entries


def _groups(manifest: Field, tasks: list[str]) -> dict[str, dict[str, list[str]]]:
    """By label the tasks and tensors of every group.

    Raises:
        CheckpointMismatchError: for a task that is in two of them, or in none of the model's.
    """
    if "groups" not in manifest:
        return {}
    found, seen = {}, set[str]()
    for label, group in manifest["groups"].entries():
        members = group["tasks"].texts()
        if seen.intersection(members) or not set(members) <= set(tasks):
            group["tasks"].fail("tasks of the model, each in one group")
        seen.update(members)
        found[label] = {"tasks": members, "tensors": group["tensors"].texts()}
    return found


def _entry(
    field: Field, task: str | None, group: str | None, tensor: str, key: str
) -> Entry:
    kind, shape = field["kind"].one_of(FORMS), field["shape"].shape()
    if len(shape) < (dims := FORMS[kind].dims):
        field["shape"].fail(f"{dims} sides at least for {kind}")
    if kind in (NEVER_SHARED if task is None else NEVER_OF_A_TASK):
        field["kind"].fail(f"a form for {'the shared part' if task is None else task}")
    without: list[str] = []
    if "without" in field:
        without = field["without"].texts()
        if not set(without) <= set(KINDS[kind].optional):
            field["without"].fail(f"some of {list(KINDS[kind].optional)}")
    options = options_of(field["options"], kind)
    return Entry(task, tensor, kind, shape, key, options, frozenset(without), group)


def read_deltas(
    directory: Path,
    manifest: Mapping[str, Any],
    *,
    verify: bool = True,
    name: str = CONFIG,
    only: Container[str] | None = None,
    beside: Mapping[str, Delta] = MappingProxyType({}),
) -> tuple[dict[str, Delta], dict[str, dict[str, Delta]]]:
    """Read back what a :class:`~.stream.DeltaWriter` wrote.

    Args:
        verify: hold every file against its SHA-256, and its contents against their form.
        name: of the manifest's file.
        only: tasks to read, and what they share; the bytes of others are not looked at, nor is the SHA-256 of files. All if
            None.
        beside: what tasks share that is kept elsewhere.

    Raises:
        CheckpointMismatchError: for a missing, truncated or altered file, and for tensors that are not those of their form.
    """
    place = directory / name
    fields = Field(place, manifest)
    entries, groups = entries_of(fields), _groups(fields, manifest["tasks"])
    tasks = [t for t in manifest["tasks"] if only is None or t in only]
    read = {None, *tasks}
    groups = {
        label: {**group, "tasks": [t for t in group["tasks"] if t in read]}
        for label, group in groups.items()
    }
    entries = [e for e in entries if e.task in read]
    entries = [e for e in entries if e.group is None or groups[e.group]["tasks"]]
    whole = verify and only is None
    where = open_tensors(directory, fields["files"].files(), verify=whole)
    for entry in entries:  # all of them, before any is read
        _check_headers(entry, where, place)
    shared: dict[str, Delta] = {}
    experts: dict[str, dict[str, Delta]] = {task: {} for task in tasks}
    common: dict[str, dict[str, Delta]] = {label: {} for label in groups}
    for entry in entries:
        delta = _read(entry, where)
        if verify:
            check_content(delta, entry, place)
        owner = shared if entry.task is None else experts[entry.task]
        owner = owner if entry.group is None else common[entry.group]
        owner[entry.tensor] = delta
    group_of = {task: label for label in groups for task in groups[label]["tasks"]}
    of_all = {**beside, **shared}
    for task, deltas in experts.items():
        label = group_of.get(task)
        apart = set() if label is None else set(groups[label]["tensors"])
        for tensor, delta in deltas.items():
            parts = common[label] if tensor in apart else of_all
            check_together(task, tensor, delta, parts.get(tensor), place)
        for tensor in sorted(apart):
            delta, part = deltas.get(tensor), common[label].get(tensor)
            there = [d for d in (delta, part, shared.get(tensor)) if d is not None]
            if there and not isinstance(delta, OwnDelta):
                shape = there[0].shape
                deltas[tensor] = GroupedDelta(shape, label, part, delta)
    return shared, experts


def _keys(entry: Entry) -> dict[str, str]:
    """By part of a delta that is there, under which key its tensor is in a file."""
    parts = [part for part in KINDS[entry.kind].parts if part not in entry.without]
    return {part: f"{entry.key}.{part}" for part in parts}


def _check_headers(entry: Entry, where: Mapping[str, Any], manifest: Path) -> None:
    """The files must hold every part of a delta, in its type and shape.

    Args:
        where: open files by key.

    Raises:
        CheckpointMismatchError: if they do not.
    """
    found = {}
    for part, key in _keys(entry).items():
        if key not in where:
            raise CheckpointMismatchError(
                f"{manifest.parent}: tensor {key} is listed in {manifest.name} and in no file. Write the model again."
            )
        found[part] = read_header(where[key], key)
    check_parts(entry, found, manifest)


def _read(entry: Entry, where: Mapping[str, Any]) -> Delta:
    parts = dict.fromkeys(entry.without)
    parts |= {part: where[key].get_tensor(key) for part, key in _keys(entry).items()}
    return KINDS[entry.kind](entry.shape, **parts, **entry.options)


def read_config(
    directory: str | Path, *, check: Callable[[Field], None] = check_told
) -> dict[str, Any]:
    """The configuration of a saved model.

    Args:
        check: of what it tells beside its weights.

    Raises:
        FileNotFoundError: if the directory holds none.
        CheckpointMismatchError: if it was altered, cannot be read, is of something else, or tells what is not as written.
        DiDiError: if it is of a later format.
    """
    path = from_home(directory) / CONFIG
    if not path.parent.exists():
        raise FileNotFoundError(
            f"{directory} does not exist. Give the directory of a merged model."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; {directory} is not a merged model saved by fusion_bench_didi."
        )
    found = read_manifest(path)
    check(Field(path, found))
    return found


def read_manifest(path: Path, *, unmarked: int | None = None) -> dict[str, Any]:
    """A manifest, whose fields are still to be checked one by one.

    Args:
        unmarked: the format of one that does not tell.

    Raises:
        CheckpointMismatchError: if it was altered, or cannot be read.
        DiDiError: if it is of a later format.
    """
    found = read_object(path)
    told = found.get("format", unmarked)
    if told is None:
        raise CheckpointMismatchError(
            f"{path} is of format None: no merged model, whose manifest tells one. A checkpoint is loaded by its own library."
        )
    if type(told) is not int or not 1 <= told <= GROUPED:
        raise DiDiError(
            f"{path} is of format {told!r}, this version reads 1 to {GROUPED}. Update fusion-bench-didi."
        )
    if told > 1 and CHECKSUM not in found:
        raise CheckpointMismatchError(
            f"{path} has no {CHECKSUM}, which format {told} has. Copy or write the whole directory again."
        )
    return found


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Sealed by a checksum; what is there when it is written is what the file speaks of."""
    write_json(path, sealed({"format": FORMAT, **manifest}))


@cache
def written_by() -> dict[str, str]:
    """For the header of a file of weights: one entry, for several would be written in any order, and files be others each time."""
    return {MARK: f"{versions()[MARK]}, format {FORMAT}"}


def versions() -> dict[str, str]:
    """Versions of what takes part in a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("fusion-bench-didi", "fusion-bench", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
