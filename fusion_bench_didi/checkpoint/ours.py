"""What this package wrote: directories that say so, and what in them is not of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointMismatchError
from ..files import is_marked
from .fields import read_object

CONFIG = "config.json"
#: What says so of a merge that is a plain checkpoint, whose ``config.json`` is the model's own.
PLAIN = "merge.json"
#: The manifest of a module of MERGE's library, which lies within a saved model too.
MODULE = "module.json"
#: What the hub's client leaves in a directory, and the end of the name of an index of shards.
_HUB, _INDEX = ".cache", ".index.json"
#: Where a saved model has its router, and directories with weights beside its own.
_ROUTER, _BACKBONE, _MODULES = "router.safetensors", "backbone", "modules"
_HOMES = (_BACKBONE, "experts", _MODULES)
_WEIGHTS = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
)


def is_ours(directory: Path, file: str = CONFIG) -> bool:
    """Whether a directory says that this package wrote it.

    Args:
        file: that says so.
    """
    try:
        return is_marked(read_object(directory / file, whole=False))
    except CheckpointMismatchError:
        return False


def held_by(directory: Path) -> Iterator[Path]:
    """Weights and directories in a directory, which could not be had again."""
    return (p for p in directory.iterdir() if p.suffix in _WEIGHTS or p.is_dir())


def others(directory: Path) -> list[str]:
    """Weights and directories in a saved model's directory that its manifest does not list: a base model beside the merge, say."""
    if not (held := [p for p in held_by(directory) if p.name != _HUB]):
        return []
    files = {*_listed(read_object(directory / CONFIG, whole=False), directory)}
    strange = []
    while held:
        path = held.pop()
        inside = path.relative_to(directory)
        if path.is_dir() and inside.parts[0] in _HOMES:
            held += held_by(path)
        elif path not in files:
            strange.append(str(inside))
    return strange


def _listed(config: Mapping[str, Any], directory: Path) -> Iterator[Path]:
    """Weights of a saved model; what a damaged manifest says otherwise than we write it is none."""
    yield from _files(config, "files", directory)
    if "router" in config:
        yield directory / _ROUTER
    yield from _files(config, "backbone_files", directory / _BACKBONE)
    experts = config.get("experts")
    for expert in experts if isinstance(experts, list) else ():
        if isinstance(expert, Mapping) and isinstance(expert.get("directory"), str):
            yield from _files(expert, "files", directory / expert["directory"])
    for file in directory.glob(f"{_MODULES}/*/{MODULE}") if "chains" in config else ():
        with suppress(CheckpointMismatchError):
            yield from _files(read_object(file, whole=False), "files", file.parent)


def _files(config: Mapping[str, Any], key: str, home: Path) -> Iterator[Path]:
    found = config.get(key)
    return (home / name for name in (found if isinstance(found, dict) else ()))


@dataclass(frozen=True)
class Kind:
    """A kind of directory that this package writes.

    Args:
        mark: the file in it that says so.
        others: what is held in such a directory that is no part of it and could not be had again.
        written: names of files in it, beside weights and their index, that are written with it; the mark is one.
        instead: another kind, which may lie in its place.
    """

    mark: str
    others: Callable[[Path], list[str]]
    written: frozenset[str]
    instead: "Kind | None" = None

    def found(self, directory: Path) -> "Kind | None":
        """The kind that a directory says it is, of those that may lie there."""
        if is_ours(directory, self.mark):
            return self
        return self.instead and self.instead.found(directory)

    def notes(self, directory: Path) -> Iterator[Path]:
        """Files beside what is written, which someone else put there: paths within the directory."""
        for file in sorted(directory.rglob("*")):
            inside, name = file.relative_to(directory), file.name
            weights = file.suffix in _WEIGHTS or name.endswith(_INDEX)
            known = name in self.written or name == self.mark or weights
            if not (known or inside.parts[0] == _HUB) and (
                file.is_symlink() or file.is_file()
            ):
                yield inside


def _others_of_plain(directory: Path) -> list[str]:
    files = read_object(directory / PLAIN, whole=False).get("files")
    known = [_HUB, *(files if isinstance(files, list) else ())]
    return [p.name for p in held_by(directory) if p.name not in known]


#: Merges: those that are plain checkpoints, and all others.
CHECKPOINT = Kind(PLAIN, _others_of_plain, frozenset((CONFIG, "generation_config.json")))  # fmt: skip
SAVED = Kind(CONFIG, others, frozenset(("README.md", MODULE)), CHECKPOINT)
