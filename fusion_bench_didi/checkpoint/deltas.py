"""The manifest of a merged model: every stored delta by kind, shape and place, and the SHA-256 of every weight file.

Nothing is parsed out of tensor names, and nothing is read or made room for before the manifest was held against the headers
of the files: a damaged file is refused. Files of format 1 have no checksum and are read as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..deltas.base import Delta
from ..deltas.kinds import KINDS
from ..deltas.names import escaped
from ..errors import CheckpointMismatchError, DiDiError
from .directory import CONFIG, write_json
from .fields import CHECKSUM, Field, read_object, sealed
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

#: what is written; all from 1 on are read
FORMAT = 2


def entry_of(task: str | None, name: str, delta: Delta) -> dict[str, Any]:
    """A delta in the manifest; its tensors are found under ``key`` and the name of the part."""
    owner = "shared" if task is None else f"experts/{_segment(task)}"
    without = [part for part in delta.parts if getattr(delta, part) is None]
    return {
        "task": task,
        "tensor": name,
        "kind": delta.kind,
        "shape": list(delta.shape),
        "key": f"{owner}/{_segment(name)}",
        "options": delta.options(),
        **({"without": without} if without else {}),
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
    places: set[tuple[str | None, str]] = set()
    keys: set[str] = set()
    for field in manifest["deltas"].elements():
        task, tensor, key = field["task"], field["tensor"].text(), field["key"].text()
        owner = None if task.value is None else task.one_of(tasks)
        if (owner, tensor) in places or key in keys:
            field.fail("every tensor of a task once, under a key of its own")
        places.add((owner, tensor))
        keys.add(key)
        entries.append(_entry(field, owner, tensor, key))
    return entries


def _entry(field: Field, task: str | None, tensor: str, key: str) -> Entry:
    kind, shape = field["kind"].one_of(FORMS), field["shape"].shape()
    form = FORMS[kind]
    if len(shape) < form.dims:
        field["shape"].fail(f"{form.dims} sides at least for {kind}")
    if kind in (NEVER_SHARED if task is None else NEVER_OF_A_TASK):
        field["kind"].fail(f"a form for {'the shared part' if task is None else task}")
    without: list[str] = []
    if "without" in field:
        without = field["without"].texts()
        if not set(without) <= set(KINDS[kind].optional):
            field["without"].fail(f"some of {list(KINDS[kind].optional)}")
    options = options_of(field["options"], form)
    return Entry(task, tensor, kind, shape, key, options, frozenset(without))


def read_deltas(
    directory: Path,
    manifest: Mapping[str, Any],
    *,
    verify: bool = True,
    name: str = CONFIG,
) -> tuple[dict[str, Delta], dict[str, dict[str, Delta]]]:
    """Read back what a :class:`~.stream.DeltaWriter` wrote.

    Args:
        verify: hold every file against its SHA-256, and its contents against their form.
        name: of the manifest's file.

    Raises:
        CheckpointMismatchError: for a missing, truncated or altered file, and for tensors that are not those of their form.
    """
    place = directory / name
    fields = Field(place, manifest)
    entries = entries_of(fields)
    where = open_tensors(directory, fields["files"].files(), verify=verify)
    for entry in entries:
        found = {}
        for part in _parts(entry):
            key = f"{entry.key}.{part}"
            if key not in where:
                raise CheckpointMismatchError(
                    f"{directory}: tensor {key} is listed in {name} and in no file. Write the model again."
                )
            found[part] = read_header(where[key], key)
        check_parts(entry, found, place)
    shared: dict[str, Delta] = {}
    experts: dict[str, dict[str, Delta]] = {task: {} for task in manifest["tasks"]}
    for entry in entries:
        keys = {part: f"{entry.key}.{part}" for part in _parts(entry)}
        parts = dict.fromkeys(entry.without)
        parts |= {part: where[key].get_tensor(key) for part, key in keys.items()}
        delta = KINDS[entry.kind](entry.shape, **parts, **entry.options)
        if verify:
            check_content(delta, entry, place)
        owner = shared if entry.task is None else experts[entry.task]
        owner[entry.tensor] = delta
    for task, deltas in experts.items():
        for tensor, delta in deltas.items():
            check_together(task, tensor, delta, shared.get(tensor), place)
    return shared, experts


def _parts(entry: Entry) -> list[str]:
    """Those that are there."""
    return [part for part in KINDS[entry.kind].parts if part not in entry.without]


def read_config(directory: str | Path) -> dict[str, Any]:
    """The configuration of a saved model.

    Raises:
        FileNotFoundError: if the directory holds none.
        CheckpointMismatchError: if it was altered, or cannot be read.
        DiDiError: if it is of a later format.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; {directory} is not a merged model saved by fusion_bench_didi."
        )
    return read_manifest(path)


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
    if type(told) is not int or not 1 <= told <= FORMAT:
        raise DiDiError(
            f"{path} is of format {told!r}, this version reads 1 to {FORMAT}. Update fusion-bench-didi."
        )
    if told > 1 and CHECKSUM not in found:
        raise CheckpointMismatchError(
            f"{path} has no {CHECKSUM}, which format {told} has. Copy or write the whole directory again."
        )
    return found


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Sealed by a checksum; what is there when it is written is what the file speaks of."""
    write_json(path, sealed({"format": FORMAT, **manifest}))


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
