"""A library of merged tasks of one base model: any number of adapters, each read by itself.

::

    <library>/library.json           the base model: class, place, digests of its tensors
    <library>/shared/<digest>/       what tasks of one merge share, stored once
    <library>/tasks/<name>/          one task: config.json, model.safetensors

Tasks appear and disappear one by one, each whole or not at all; there is no list that all of them stand in. Processes that add
or remove at the same time take turns, so that what tasks share stays while any of them uses it. A task's files have a checksum
of their own.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from torch import nn

from ..checkpoint import backbone as backbones
from ..checkpoint.deltas import (
    read_config,
    read_deltas,
    read_manifest,
    versions,
    write_manifest,
)
from ..checkpoint.directory import alone, whole_directory
from ..checkpoint.fields import Field, is_digest
from ..checkpoint.ours import CONFIG
from ..checkpoint.stream import write_deltas
from ..checkpoint.told import check_of_task
from ..deltas.base import Delta
from ..deltas.grouped import apart
from ..errors import DiDiError, spelled
from ..files import from_home
from ..models.dynamic import DynamicModel
from ..task_vectors.digests import digests
from .combining import check_entries, combined
from .facts import OF_CHECKPOINTS
from .loading import named, on_backbone
from .places import Place, stored_of
from .stored import Stored, check_known

#: Checksums of the tensors of deltas.
Seen = dict[Delta, dict[str, str]]

INDEX = "library.json"
_SHARED, _TASKS = "shared", "tasks"
#: Bytes of a name as that of a directory.
_LONGEST = 200
#: Seconds to wait for another process that changes the library.
PATIENCE = 600.0


class AdapterLibrary:
    """A directory of tasks; made at the first :meth:`add`.

    Args:
        place: the directory.

    Raises:
        CheckpointMismatchError: if it is there and no library.
    """

    def __init__(self, place: str | Path):
        self.place = from_home(place)
        if self.place.exists() and not (
            self.place.is_dir() and all(map(_passing, self.place.iterdir()))
        ):
            self._entry()

    def __repr__(self) -> str:
        return f"AdapterLibrary({str(self.place)!r}) of {len(self.tasks)} tasks"

    def __contains__(self, task: str) -> bool:
        return isinstance(task, str) and (self._of_task(task) / CONFIG).is_file()

    @property
    def tasks(self) -> list[str]:
        """Names, sorted; no file is opened. What else lies beside the tasks is none."""
        places = _written(self.place / _TASKS)
        named = ((place, unquote(place.name)) for place in places)
        return sorted(task for place, task in named if place == self._of_task(task))

    def bits(self, task: str) -> int:
        """Bits of one task, without what it shares with others."""
        return self._config(task)["bits"].integer()

    def add(
        self,
        source: Place,
        tasks: str | Iterable[str] | None = None,
        *,
        overwrite: bool = False,
    ) -> list[str]:
        """Take tasks of a merged model, all if None; returns their names.

        Raises:
            FileExistsError: if a task is there and ``overwrite`` is false; nothing is written then.
            CheckpointMismatchError: for a model of another base model.
            UnknownTaskError: for a task that the model does not hold.
            DiDiError: for no tasks, and for a name that none can have.
        """
        asked = None if tasks is None else named(tasks)
        if isinstance(source, nn.Module):
            stored = Stored.of(source)
            values = {name: source.base_tensor(name) for name in source.touched}
            known = source.info.get("backbone", {})
            entry = backbones.describe(source.backbone, values, known)
        else:
            config = read_config(source)
            stored, entry = stored_of(from_home(source), config), config["backbone"]
        asked = stored.tasks if asked is None else asked
        check_known(asked, stored.tasks, Path(str(source)[:_LONGEST]))
        for task in asked:
            name = quote(task, safe=" ")
            if not task or task.startswith(".") or len(name) > _LONGEST:
                raise DiDiError(
                    f"{task!r} is no name for a task of a library, expected 1 to {_LONGEST} bytes that begin with no dot."
                )
            if not overwrite and task in self:
                raise FileExistsError(
                    f"{self.place} has a task {task!r} already. Choose another name, or replace it: {spelled('overwrite', 'true')}."
                )
        self.place.mkdir(parents=True, exist_ok=True)
        with self._turn():
            stored = self._of_base(stored, entry)
            seen: Seen = {}
            replaces = any(task in self for task in asked)
            kept = self._shared_by({*self.tasks} - {*asked}) if replaces else set()
            for task in asked:
                self._write(stored, task, overwrite, seen)
            if replaces:
                self._forget_shared(kept | self._shared_by(asked))
        return asked

    def remove(self, task: str) -> None:
        """Forget a task; what only it shared is gone too.

        Raises:
            UnknownTaskError: if it is not there.
            CheckpointMismatchError: if another cannot be read, which may share something with it; nothing is removed then.
        """
        check_known([task], self.tasks, self.place)
        place = self._of_task(task)
        with self._turn():
            check_known([task], self.tasks, self.place)  # it may be gone meanwhile
            kept = self._shared_by({*self.tasks} - {task})
            with alone(place):
                gone = place.with_name(f".{place.name}.gone")
                shutil.rmtree(gone, ignore_errors=True)
                place.rename(gone)
                shutil.rmtree(gone)
            self._forget_shared(kept)

    def load(
        self,
        tasks: str | Iterable[str],
        backbone: nn.Module | str | Path | None = None,
    ) -> DynamicModel:
        """A model of some tasks, in the order given; files of others are not opened.

        Args:
            backbone: the base model, taken over, or its directory or repository; loaded from where the first merge took it if None.

        Raises:
            UnknownTaskError: for a task that is not there.
            CheckpointMismatchError: for damaged files, or another base model.
        """
        asked = named(tasks)
        missing = [task for task in asked if task not in self]
        if missing:
            check_known(missing, self.tasks, self.place)
        by_part: dict[str | None, Stored] = {}
        for task in asked:
            config = self._config(task)
            part = config["shared"].value
            if part not in by_part:
                by_part[part] = self._empty(config, part)
            by_part[part] = self._with(by_part[part], task, config)
        stored = reduce(combined, by_part.values())
        experts = {task: stored.experts[task] for task in asked}
        stored = replace(stored, experts=experts).useful()
        return on_backbone(stored, self._entry(), self.place, backbone)

    def _turn(self) -> AbstractContextManager:
        """While it lasts no other process changes the library."""
        return alone(self.place / INDEX, named=self.place, patience=PATIENCE)

    def _shared_by(self, tasks: Iterable[str]) -> set[str | None]:
        """What tasks share with others."""
        return {self._config(task)["shared"].value for task in tasks}

    def _forget_shared(self, kept: set[str | None]) -> None:
        """Remove what tasks shared, but for what is kept."""
        for part in _written(self.place / _SHARED):
            ours = is_digest(part.name) and not part.is_symlink()
            if ours and part.name not in kept:
                shutil.rmtree(part)

    def _of_task(self, task: str) -> Path:
        name = quote(task, safe=" ", errors="surrogatepass")
        return self.place / _TASKS / name

    def _config(self, task: str) -> Field:
        place = self._of_task(task)
        config = Field(place / CONFIG, read_config(place, check=_check_task))
        if config["tasks"].texts() != [task]:
            config["tasks"].fail(f"{task!r} alone")
        return config

    def _empty(self, config: Field, part: str | None) -> Stored:
        """A stored model of no tasks, with the shared part of one merge."""
        shared: Mapping[str, Delta] = {}
        if part is not None:
            place = self.place / _SHARED / part
            shared, _ = read_deltas(place, read_config(place))
        units = config["unit_bits"].value, config["backbone_bits"].value
        return Stored(shared, {}, *units, {"method": "AdapterLibrary"})

    def _with(self, stored: Stored, task: str, config: Field) -> Stored:
        """A stored model with one task more."""
        place = self._of_task(task)
        _, experts = read_deltas(place, config.value, beside=stored.shared)
        told = config["info"].value
        info = {
            key: {**stored.info.get(key, {}), task: told.get(key)}
            for key in OF_CHECKPOINTS
            if told.get(key) is not None
        }
        return replace(
            stored,
            experts={**stored.experts, **experts},
            info={**stored.info, **info},
            unit_bits=max(stored.unit_bits, config["unit_bits"].value),
            backbone_bits=max(stored.backbone_bits, config["backbone_bits"].value),
        )

    def _write(self, stored: Stored, task: str, overwrite: bool, seen: Seen) -> None:
        shared, expert = seen_by(stored, task)
        part = digest_of(shared, seen) if shared else None
        if part is not None and not (self.place / _SHARED / part).exists():
            self._write_shared(part, shared)
        told = ((key, stored.info.get(key, {}).get(task)) for key in OF_CHECKPOINTS)
        info = {key: value for key, value in told if value is not None}
        with whole_directory(self._of_task(task), overwrite=overwrite) as place:
            manifest = write_deltas(place, {}, {task: expert})
            config = {
                "unit_bits": stored.unit_bits,
                "backbone_bits": stored.backbone_bits,
                "bits": sum(delta.bits for delta in expert.values()),
                "shared": part,
                "info": info,
                "versions": versions(),
                **manifest,
            }
            write_manifest(place / CONFIG, config)

    def _write_shared(self, part: str, shared: Mapping[str, Delta]) -> None:
        with suppress(FileExistsError):  # another process wrote the same
            with whole_directory(self.place / _SHARED / part) as place:
                manifest = write_deltas(place, shared, {})
                write_manifest(place / CONFIG, {"versions": versions(), **manifest})

    def _entry(self) -> dict[str, Any]:
        """The library's entry for the base model.

        Raises:
            CheckpointMismatchError: if this is no library.
        """
        file = self.place / INDEX
        fields = Field(file, read_manifest(file))
        backbones.check_entry(fields["backbone"])
        return fields["backbone"].value

    def _of_base(self, stored: Stored, entry: Mapping[str, Any]) -> Stored:
        """A stored model, with tensors named as in the library, whose base model it must be of; of a new one it becomes that.

        Raises:
            CheckpointMismatchError: if it is another.
        """
        if "fingerprint" in entry:
            raise DiDiError(
                "The model was written by an early version, whose checks of the base model are others. Load it and save it again."
            )
        if (self.place / INDEX).exists():
            known = self._entry()
            entry, spell = backbones.spelled_beside(entry, known)
            check_entries(known, entry, names=(self.place, "the model"))
            return stored.spelled(spell)
        found = {"versions": versions(), "backbone": dict(entry)}
        write_manifest(self.place / INDEX, found)
        return stored


def _check_task(config: Field) -> None:
    config["unit_bits"].integer(1)
    config["backbone_bits"].integer()
    check_of_task(config["info"])
    if config["shared"].value is not None:
        config["shared"].digest()


def _passing(found: Path) -> bool:
    """Whether a path in a library may be there before its index is: a lock, or the index half written."""
    return found.name.startswith(".") or found.name == f"{INDEX}.tmp"


def _written(home: Path) -> Iterator[Path]:
    """Directories that hold a manifest, in one that may not be there; neither locks nor what someone else put there."""
    manifests = home.glob(f"[!.]*/{CONFIG}")
    return (file.parent for file in manifests if file.is_file())


def seen_by(stored: Stored, task: str) -> tuple[dict[str, Delta], dict[str, Delta]]:
    """A task's shared deltas and its own ones, groups taken apart."""
    deltas = stored.experts[task]
    common, own, groups = apart({task: deltas})
    grouped = {name for group in groups.values() for name in group["tensors"]}
    shared = {n: delta for n, delta in stored.shared.items() if n not in grouped}
    return shared | {name: delta for (_, name), delta in common.items()}, own[task]


def digest_of(deltas: Mapping[str, Delta], seen: Seen) -> str:
    """SHA-256 of names, forms and tensors.

    Args:
        seen: what was taken before; they are not read again.
    """
    digest = hashlib.sha256()
    for name in sorted(deltas):
        delta = deltas[name]
        if delta not in seen:
            seen[delta] = digests(delta.tensors())
        what = (name, delta.kind, delta.shape, sorted(delta.options().items()))
        digest.update(repr((*what, sorted(seen[delta].items()))).encode())
    return digest.hexdigest()
