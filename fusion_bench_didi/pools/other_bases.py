"""Adapters that were trained on another base model than the pool's, by what their configurations call it."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from fusion_bench.modelpool import BaseModelPool

from ..errors import some
from ..task_vectors.lora_adapter import AdapterSource
from ..task_vectors.places import is_name
from ..task_vectors.sources import TensorSource
from .entries import BASE, asked

log = logging.getLogger(__name__)

#: Files of one size are compared in so many pieces, all files of a model together, of so many bytes.
_PIECES = 256
_BYTES = 2**12


def tell_of_other_bases(
    modelpool: BaseModelPool, tuned: Mapping[str, TensorSource]
) -> None:
    """Warn of adapters that name another base model."""
    base = asked(modelpool, BASE)
    if base is None or not base[0]:
        return
    place, inside = os.fspath(base[0]), base[1]
    named = {
        task: source.trained_on
        for task, source in tuned.items()
        if isinstance(source, AdapterSource) and isinstance(source.trained_on, str)
    }
    same = {
        name: not name or same_model(name, place, inside) for name in {*named.values()}
    }
    if other := [f"{task} on {name}" for task, name in named.items() if not same[name]]:
        log.warning(
            "The base model is %s, and adapters were trained on another, by their configuration: %s. What they learned is added to "
            "%s all the same, and is worth little there if the two differ; give the one that they were trained on as "
            "modelpool.models.%s then.",
            place,
            some(other),
            place,
            BASE,
        )


def same_model(one: str, other: str, subfolder: str = "") -> bool:
    """Whether two places mean one model: directories by their weights, as far as both are there, and names of the hub without their
    owner where one has none, or is a directory.

    Args:
        subfolder: of the weights.
    """
    one, other = (os.path.normpath(os.path.expanduser(at)) for at in (one, other))
    if os.path.isdir(one) and os.path.isdir(other):
        return _same_weights(Path(one), Path(other), subfolder)
    names = [*map(_on_hub, (one, other))]
    if names == [None, None]:
        return one == other
    left, right = (
        (name or os.path.basename(at)).casefold()
        for name, at in zip(names, (one, other))
    )
    if None not in names and "/" in left and "/" in right:
        return left == right
    return left.rpartition("/")[2] == right.rpartition("/")[2]


def _on_hub(place: str) -> str | None:
    """A place as a name of the hub, which a directory in its cache tells too; None for other directories."""
    home, _, _ = place.partition("/snapshots/")
    cached = os.path.basename(home)
    if home != place and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    there = os.path.isdir(place)
    return place if not there and is_name(place, owned=False) else None


def _same_weights(one: Path, other: Path, subfolder: str) -> bool:
    """Whether two directories hold the same files of weights: by their sizes, and by pieces of them, which fine-tuning changes."""
    if one.samefile(other):
        return True
    left, right = (_files(at / subfolder) for at in (one, other))
    if not left or left.keys() != right.keys():
        return False
    pieces = max(_PIECES // len(left), 1)
    try:
        return all(_alike(left[name], right[name], pieces) for name in left)
    except OSError:
        return False


def _files(directory: Path) -> dict[str, Path]:
    """Files of weights by name."""
    found = sorted(directory.glob("model*.safetensors"))
    return {f.name: f for f in found or directory.glob("pytorch_model*.bin")}


def _alike(one: Path, other: Path, pieces: int) -> bool:
    size = one.stat().st_size
    if size != other.stat().st_size:
        return False
    if one.samefile(other):
        return True
    step = max(size // pieces, _BYTES)
    with one.open("rb") as left, other.open("rb") as right:
        for start in range(0, size, step):
            left.seek(start)
            right.seek(start)
            if left.read(_BYTES) != right.read(_BYTES):
                return False
    return True
