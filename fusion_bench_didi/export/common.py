"""What all exports begin and end with: tasks, the base model, where it lies, and the directory."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from ..checkpoint.companions import COMPANIONS, TEMPLATES
from ..checkpoint.deltas import versions, write_manifest
from ..checkpoint.directory import check_target, whole_directory
from ..checkpoint.fields import read_object
from ..checkpoint.ours import CONFIG, Kind, held_by
from ..editing.loading import named
from ..editing.stored import check_known
from ..errors import DiDiError
from ..files import from_home
from ..models.dynamic import DynamicModel
from ..models.overview import place_of
from ..task_vectors.lora_config import CONFIG as ADAPTER
from .report import ExportReport

#: The file that says what an exported directory holds.
MANIFEST = "export.json"
#: Files with weights in the directory of a task.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|adapter_model\.safetensors")
#: Bytes of a file's name, with room for an ending.
LONGEST = 200


def asked_tasks(model: DynamicModel, tasks: Sequence[str] | str | None) -> list[str]:
    """The tasks to export, all if None.

    Raises:
        UnknownTaskError: naming those that the model does not hold.
        DiDiError: if none are asked for, or there are none.
    """
    if not model.tasks:
        raise DiDiError(
            "The merged model holds no task, so there is nothing to export."
        )
    asked = model.tasks if tasks is None else named(tasks)
    check_known(asked, model.tasks, "The merged model", most=len(model.tasks))
    return asked


def folder(task: str) -> str:
    """A task's name as the name of a file, which neither another task's is nor that of the manifest or of what it is written to."""
    name = quote(task, safe="")
    if len(name) > LONGEST:
        name = f"{name[:LONGEST - 17]}-{sha256(task.encode()).hexdigest()[:16]}"
    if name.startswith(".") or name.lower().startswith(MANIFEST):
        return f"%{ord(name[0]):02X}{name[1:]}"
    return name


def base_model(model: DynamicModel) -> nn.Module:
    """An independent copy of the backbone with the base model's weights."""
    return model.materialize(model.tasks[0], as_base=model.touched)


def source_of(model: DynamicModel, given: str | Path | None) -> dict[str, str]:
    """Where the base model lies: repository or directory, from the root so that it is found from elsewhere, and its revision where
    one was named.

    Args:
        given: takes the place of what the merged model remembers.
    """
    known: Any = model.info.get("backbone", {}).get("source")
    source = known if given is None else given
    revision = source.get("revision") if isinstance(source, Mapping) else None
    place = place_of(source)
    if place and (local := from_home(place)).is_dir():
        place = str(local.absolute())
    found = {"place": place, "revision": revision}
    return {key: value for key, value in found.items() if value}


def _others(directory: Path) -> list[str]:
    """Names of weights and directories within an export that are no part of it."""
    if not (held := list(held_by(directory))):
        return []
    report = read_object(directory / MANIFEST, whole=False)
    tasks = report.get("bytes")
    parts = {folder(task) for task in tasks} if isinstance(tasks, dict) else set()
    if report.get("form") == "patch":
        files = {f"{part}.safetensors" for part in parts}
        return [p.name for p in held if p.is_dir() or p.name not in files]
    found = [p for p in held if not p.is_dir() or p.name not in parts]
    for home in set(held) - set(found):
        others = (p for p in held_by(home) if p.name != TEMPLATES)
        found += [p for p in others if not _WEIGHTS.fullmatch(p.name)]
    return [str(path.relative_to(directory)) for path in found]


#: A directory with an export.
EXPORT = Kind(MANIFEST, _others, frozenset((CONFIG, ADAPTER, "README.md", *COMPANIONS)))


@contextmanager
def export_directory(
    target: str | Path, *, overwrite: bool
) -> Iterator[tuple[Path, Path]]:
    """A directory to write an export into, and the place that it takes when all of it is written and checked.

    Raises:
        FileExistsError, DiDiError: as by :func:`~fusion_bench_didi.checkpoint.directory.whole_directory`.
    """
    final = check_target(target, overwrite=overwrite, kind=EXPORT)
    with whole_directory(target, overwrite=overwrite, kind=EXPORT) as place:
        yield place, final


def write_report(place: Path, report: ExportReport) -> ExportReport:
    """Leave the report beside what it is about."""
    write_manifest(place / MANIFEST, {**report.as_dict(), "versions": versions()})
    return report


def weight_bytes(place: Path) -> int:
    """Bytes of the safetensors files in a directory."""
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))
