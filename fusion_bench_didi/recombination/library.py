"""Modules with names, each made once and stored once.

The id of a module is its component and a digest of checkpoints, component and its tensors, sorted tasks, operator and operator
settings, so that the same decision on the same checkpoints has the same id in every search. On disk a library is a
directory of directories, ``<id>/model.safetensors`` and ``<id>/module.json``.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..checkpoint.deltas import read_deltas, read_manifest, write_manifest
from ..checkpoint.directory import sweep, whole_directory
from ..checkpoint.fields import Field, inside
from ..checkpoint.ours import MODULE
from ..checkpoint.stream import write_deltas
from ..deltas.base import Delta
from ..errors import CheckpointMismatchError
from ..task_vectors.sources import digest_of
from ..task_vectors.tower_names import Spelling
from .components import Component, ComponentReader
from .low_rank import SVDCache
from .operators import OperatorSettings, combine
from .recent import Recent

log = logging.getLogger(__name__)

_REMAINS = re.compile(
    r"(model|shard)[-\w]*\.safetensors(\.index\.json(\.tmp)?)?|module\.json(\.tmp)?"
)


class StackedDelta(Delta):
    """A task's own delta on top of its group's, seen as one. In memory only, owns no tensors."""

    kind = "layered"
    parts = ()

    def __init__(self, shared: Delta, own: Delta):
        super().__init__(own.shape)
        self.below, self.above = shared, own

    def own(self) -> Tensor:
        return self.above.change(self.below)


@dataclass(frozen=True)
class ModularExpert:
    """One modular expert: a component for a group of tasks.

    Args:
        shared: deltas that all tasks of the group use.
        experts: deltas per task on top of them; low-rank operators only.
    """

    id: str
    component: str
    tasks: tuple[str, ...]
    operator: str
    shared: Mapping[str, Delta] = field(repr=False)
    experts: Mapping[str, Mapping[str, Delta]] = field(repr=False)

    def without(self, task: str) -> "ModularExpert":
        """What is left of it for the other tasks, under the same id."""
        return replace(
            self,
            tasks=tuple(t for t in self.tasks if t != task),
            experts={t: deltas for t, deltas in self.experts.items() if t != task},
        )

    @cached_property
    def bits(self) -> int:
        return sum(d.bits for deltas in self.parts for d in deltas.values())

    @property
    def parts(self) -> tuple[Mapping[str, Delta], ...]:
        """Its deltas: for all tasks, then of each."""
        return self.shared, *self.experts.values()

    def spelled(self, spell: Spelling) -> "ModularExpert":
        """The same for tensors of other names."""
        shared, *own = (
            {spell(name): delta for name, delta in deltas.items()}
            for deltas in self.parts
        )
        return replace(self, shared=shared, experts=dict(zip(self.experts, own)))

    def deltas(self, task: str) -> dict[str, Delta]:
        """One delta for each tensor that it changes for a task."""
        own, found = self.experts.get(task, {}), dict(self.shared)
        for name, delta in own.items():
            shared = found.get(name)
            found[name] = delta if shared is None else StackedDelta(shared, delta)
        return found

    def change(self, task: str) -> dict[str, Tensor]:
        """The change of each tensor for a task, in float32."""
        return {name: delta.change() for name, delta in self.deltas(task).items()}


def module_id(
    component: Component,
    tasks: Sequence[str],
    operator: str,
    settings: OperatorSettings,
    checkpoints: str,
) -> str:
    """Id of a module: component and digest.

    Args:
        checkpoints: a name of those that it is made of, :attr:`.ComponentReader.checkpoints`.
    """
    made_of = [checkpoints, component.name, component.tensors, sorted(tasks)]
    content = [*made_of, operator, asdict(settings)]
    digest = digest_of(json.dumps(content, sort_keys=True).encode())
    return f"{component.name}-{digest[:12]}"


class Library:
    """Makes modules on demand and keeps those used last.

    A module depends on nothing but its decision, so one that was dropped comes back the same.

    Args:
        reader: task vectors.
        memory_bits: modules kept in memory.
    """

    def __init__(
        self,
        reader: ComponentReader,
        settings: OperatorSettings = OperatorSettings(),
        *,
        memory_bits: int = 8 * 2**31,
    ):
        self._reader, self._settings = reader, settings
        self._spectra = SVDCache()
        self._kept: Recent[ModularExpert] = Recent(memory_bits, lambda m: m.bits)
        self.made = 0

    def get(
        self, component: Component, tasks: Sequence[str], operator: str
    ) -> ModularExpert:
        """The module of a decision."""
        tasks = tuple(sorted(tasks))
        key = module_id(
            component, tasks, operator, self._settings, self._reader.checkpoints
        )
        return self._kept.get(key, lambda: self._make(key, component, tasks, operator))

    def _make(
        self, key: str, component: Component, tasks: tuple[str, ...], operator: str
    ) -> ModularExpert:
        parts = combine(
            operator,
            self._reader.read(component, tasks),
            tasks,
            unit_bits=component.bits,
            settings=self._settings,
            spectra=self._spectra,
        )
        self.made += 1
        return ModularExpert(
            key, component.name, tasks, operator, parts.shared, parts.experts
        )


def save_modules(directory: Path, modules: Iterable[ModularExpert]) -> list[str]:
    """Write each distinct module once; those that lie there already, and whole, are left alone. Returns the ids.

    Raises:
        FileExistsError: for a damaged one beside which lies something else, and for what is none.
    """
    distinct = {module.id: module for module in modules}
    for key, module in distinct.items():
        if there := (directory / key / MODULE).is_file():
            sweep(directory / key)
            if _is_whole(directory, key):
                continue
        _remove_remains(directory / key)
        if there:
            log.warning("%s was damaged; it is written anew.", directory / key)
        facts = {
            "id": key,
            "component": module.component,
            "group": module.tasks,
            "operator": module.operator,
            "bits": module.bits,
        }
        with whole_directory(directory / key) as place:
            manifest = write_deltas(place, module.shared, module.experts)
            write_manifest(place / MODULE, {**facts, **manifest})
    return list(distinct)


def _is_whole(directory: Path, key: str) -> bool:
    with suppress(CheckpointMismatchError):
        return key in load_modules(directory, [key])
    return False


def _remove_remains(place: Path) -> None:
    """Of a module that is damaged, or whose writing was cut short by a release that wrote modules where they belong."""
    files = list(place.iterdir()) if place.is_dir() else []
    if all(_REMAINS.fullmatch(file.name) for file in files):
        shutil.rmtree(place, ignore_errors=True)
    if os.path.lexists(place):
        raise FileExistsError(
            f"{place} is no whole module of a library, and is a link or holds something else. Move it elsewhere, and run this again."
        )


def load_module(place: Path) -> ModularExpert:
    """One module of a library.

    Raises:
        CheckpointMismatchError: if it is missing or damaged.
    """
    if not (place / MODULE).is_file():
        raise CheckpointMismatchError(
            f"{place} holds no module (no {MODULE}); the library is not whole. Copy all of it, or search again."
        )
    manifest = read_manifest(place / MODULE, unmarked=1)
    facts = Field(place / MODULE, manifest)
    group = facts["group"].texts()
    if not set(facts["tasks"].texts()) <= set(group):
        facts["tasks"].fail(f"some of {group}")
    shared, experts = read_deltas(place, manifest, name=MODULE)
    return ModularExpert(
        facts["id"].text(),
        facts["component"].text(),
        tuple(group),
        facts["operator"].text(),
        shared,
        experts,
    )


def load_modules(directory: Path, ids: Iterable[str]) -> dict[str, ModularExpert]:
    """Load modules by id.

    Raises:
        CheckpointMismatchError: if one is missing, damaged, or another one.
    """
    found = {}
    for key in dict.fromkeys(ids):
        found[key] = load_module(inside(directory, key))
        if found[key].id != key:
            raise CheckpointMismatchError(
                f"{directory / key} holds the module {found[key].id!r}; the library is mixed up. Copy all of it, or search again."
            )
    return found
