"""What all exports begin and end with: tasks, the base model, where it lies, and the directory."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn

from ..checkpoint.deltas import versions, write_manifest
from ..checkpoint.directory import check_target, whole_directory
from ..checkpoint.fields import read_object
from ..checkpoint.ours import CONFIG, Kind, held_by
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
#: Files of tokenizers, of how they lay out conversations, of processors and of generation, which are data.
_TOKENIZER = frozenset(
    {
        *("added_tokens.json", "merges.txt", "sentencepiece.bpe.model"),
        *("special_tokens_map.json", "spiece.model", "tokenizer.json"),
        *("tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    }
)
_TEMPLATE = frozenset({"chat_template.jinja", "chat_template.json"})
_PROCESSOR = frozenset(
    f"{kind}_config.json"
    for kind in ("preprocessor", "processor", "video_preprocessor")
)
COMPANIONS = _TOKENIZER | _TEMPLATE | _PROCESSOR | {"generation_config.json"}
#: Where a task's checkpoint has some of the first, none of the second are taken of the base model.
_TOGETHER = (
    (_TOKENIZER, _TOKENIZER | _TEMPLATE),
    (_TEMPLATE, _TEMPLATE),
    (_PROCESSOR, _PROCESSOR),
)

_AWAY = "is no directory and cannot be fetched"


def asked_tasks(model: DynamicModel, tasks: Sequence[str] | str | None) -> list[str]:
    """The tasks to export, all if None.

    Raises:
        UnknownTaskError: naming those that the model does not hold.
        DiDiError: for none.
    """
    asked = [tasks] if isinstance(tasks, str) else list(tasks or model.tasks)
    check_known(asked, model.tasks, "The merged model", most=len(model.tasks))
    if not asked:
        raise DiDiError(
            "The merged model holds no task, so there is nothing to export."
        )
    return list(dict.fromkeys(asked))


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
    """Where the base model lies: repository or directory, and its revision where one was named.

    Args:
        given: takes the place of what the merged model remembers.
    """
    known: Any = model.info.get("backbone", {}).get("source")
    source = known if given is None else given
    revision = source.get("revision") if isinstance(source, Mapping) else None
    found = {"place": place_of(source), "revision": revision}
    return {key: value for key, value in found.items() if value}


class Companions(NamedTuple):
    """Files beside the weights of a model: its tokenizer, processor and generation settings.

    Args:
        place: of the model; None if it was in memory.
        files: by name; None if they cannot be read.
    """

    place: str | None
    files: Mapping[str, Path] | None


def companions_at(place: str | None = None, revision: str | None = None) -> Companions:
    """Those of a directory, or of a repository of the hub, of which nothing else is fetched."""
    if place is None:
        return Companions(None, None)
    home = from_home(place)
    if not home.is_dir():
        names = sorted(COMPANIONS)
        try:
            home = Path(snapshot_download(place, revision=revision, allow_patterns=names))  # fmt: skip
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            return Companions(place, None)
    found = {name: home / name for name in sorted(COMPANIONS)}
    return Companions(place, {n: file for n, file in found.items() if file.is_file()})


def copy_companions(
    directory: Path, of_base: Companions, own: Companions = Companions(None, None)
) -> str | None:
    """Put files beside a checkpoint: those of its own fine-tuned model, and of what that has none the base model's.

    Returns:
        what could not be had, if anything.
    """
    tuned, found = own.files or {}, dict(of_base.files or {})
    for some, instead in _TOGETHER:
        if some & tuned.keys():
            found = {name: file for name, file in found.items() if name not in instead}
    found |= tuned
    for name, file in found.items():
        if not (directory / name).exists():
            shutil.copyfile(file, directory / name)
    away = [at.place for at in (own, of_base) if at.place and at.files is None]
    if found:
        if own.place not in away:
            return None
        return f"tokenizer and processor are the base model's: {own.place} {_AWAY}."
    if away:
        return f"no tokenizer or processor was copied: {away[0]} {_AWAY}. Name another one (base)."
    if place := of_base.place or own.place:
        return f"{place} holds no tokenizer or processor to copy."
    return "no tokenizer or processor was copied: the model was in memory. Name the base model's directory or repository (base), or copy them."


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
        found += [p for p in held_by(home) if not _WEIGHTS.fullmatch(p.name)]
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
