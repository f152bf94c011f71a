"""The weight files that the host's ``from_pretrained`` would read of a directory, in its order of preference."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointMismatchError, ModelPoolError
from ..files import is_marked
from ..task_vectors.file_sources import PickleSource, SafetensorsSource, read_json
from ..task_vectors.float8 import Float8Source
from ..task_vectors.renaming import RenamedSource
from ..task_vectors.sources import TensorSource


@dataclass(frozen=True)
class Weights:
    """Which weights of a repository are asked for.

    Args:
        variant: ``fp16`` for ``model.fp16.safetensors``.
        use_safetensors: True or False allow only safetensors or only pickles.
        subfolder: of the repository.
    """

    variant: str | None = None
    use_safetensors: bool | None = None
    subfolder: str = ""


def open_weights(
    directory: Path, label: str, weights: Weights = Weights()
) -> TensorSource | None:
    """The weights of a ``save_pretrained`` directory; None where the host would look for something else.

    ``model.safetensors`` comes before an index of shards, which an earlier save may have left there, and safetensors come
    before pickles.

    Raises:
        CheckpointMismatchError: for a broken file or index.
        ModelPoolError: for a merged model.
    """
    check_unmerged(directory, label, weights)
    home = directory / weights.subfolder
    config = _configuration(home, label)
    elsewhere = config.get("transformers_weights")
    source = None if elsewhere else _found(home, label, weights)
    return None if source is None else Float8Source.over(source)


def check_unmerged(directory: Path, label: str, weights: Weights = Weights()) -> None:
    """What is to be merged, or stands under a merge, must be a model, and no merged one of this package.

    Args:
        label: of the model, for messages.

    Raises:
        ModelPoolError: if it is merged.
        CheckpointMismatchError: if the configuration is no JSON.
    """
    home = directory / weights.subfolder
    if is_marked(_configuration(home, label)):
        raise ModelPoolError(
            f"{label}: {home} is a merged model of this package, which holds changes of a base model and no model of its own. "
            f"Write a task of it as a checkpoint first (didi export {home} OUT --form plain, or "
            "materialize(task).save_pretrained(OUT) in Python), or give what it was merged from."
        )


def _configuration(home: Path, label: str) -> Mapping[str, Any]:
    """What a configuration says, if there is one."""
    file = home / "config.json"
    if not file.is_file():
        return {}
    found = read_json(file, label, "the configuration of a model")
    return found if isinstance(found, Mapping) else {}


def _found(directory: Path, label: str, weights: Weights) -> TensorSource | None:
    single, index = _named("model", "safetensors", weights.variant)
    if weights.use_safetensors is not False:
        if (directory / single).exists():
            return SafetensorsSource([directory / single], label)
        if (directory / index).exists():
            return _sharded(SafetensorsSource, directory / index, label)
    single, index = _named("pytorch_model", "bin", weights.variant)
    if weights.use_safetensors is not True:
        if (directory / single).exists():
            return PickleSource([directory / single], label)
        if (directory / index).exists():
            return _sharded(PickleSource, directory / index, label)
    return None


def index_files(variant: str | None = None) -> tuple[str, str]:
    """Names of the indices of shards."""
    stems = ("model", "safetensors"), ("pytorch_model", "bin")
    first, second = (_named(*stem, variant)[1] for stem in stems)
    return first, second


def _named(stem: str, ending: str, variant: str | None) -> tuple[str, str]:
    """Names of a single file, and of the index of shards."""
    middle = f".{variant}" if variant else ""
    return f"{stem}{middle}.{ending}", f"{stem}.{ending}.index{middle}.json"


def _sharded(
    kind: type[SafetensorsSource] | type[PickleSource], index: Path, label: str
) -> TensorSource:
    """The tensors that an index names; transformers 4 does not load others, which an earlier save may have left in a shard."""
    names, files = _indexed(index, label)
    source = kind(files, label)
    left = source.infos().keys() - names
    if not left:
        return source
    kept = {name: name for name in source.infos() if name in names}
    return RenamedSource(source, kept, dict.fromkeys(left, f"not in {index.name}"))


def _indexed(index: Path, label: str) -> tuple[set[str], list[Path]]:
    """Names of tensors in an index, and its files, which lie beside it."""
    found = read_json(index, label, "an index of shards")
    names = found.get("weight_map") if isinstance(found, Mapping) else None
    if not isinstance(names, Mapping) or not names:
        raise CheckpointMismatchError(
            f"{label}: {index} is not an index of shards (it has no weight_map). Download or write it again."
        )
    shards = sorted({str(name) for name in names.values()})
    outside = [
        name
        for name in shards
        if Path(name).name != name or name in ("", "..") or not name.isprintable()
    ]
    if outside:
        raise CheckpointMismatchError(
            f"{label}: {index} names {outside[0]!r}, expected files beside it. Download it again, from a source that you trust."
        )
    return set(names), [index.parent / name for name in shards]
