"""The weight files that the host's ``from_pretrained`` would read of a directory, in its order of preference.

Whether there is a configuration, and whether it asks for more layers than there are tensors in them, or for more classes, is
checked too.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointMismatchError, ModelPoolError
from ..files import is_marked
from ..task_vectors.file_sources import PickleSource, SafetensorsSource, read_json
from ..task_vectors.float8 import Float8Source
from ..task_vectors.lora_config import CONFIG
from ..task_vectors.mxfp4 import Mxfp4Source
from ..task_vectors.quantized import unread
from ..task_vectors.renaming import RenamedSource
from ..task_vectors.sources import TensorSource

#: The host's order of preference: stem and ending of names, the reader, and the ``use_safetensors`` that rules them out.
_KINDS = (
    ("model", "safetensors", SafetensorsSource, False),
    ("pytorch_model", "bin", PickleSource, True),
)
#: Settings that say how often something with weights is made; transformers makes them one by one.
_COUNTS = re.compile(r"(?!max_)\w*(layers?|experts|depth)")
#: So many are made in seconds, whatever the weights hold.
_FEW = 1000
#: The classes of a head, each of which gets a name; so many get theirs in a second.
_LABELS, _MANY_LABELS = "num_labels", 2**17


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a ``save_pretrained`` directory, and what its ``config.json`` says of them.

    Args:
        label: of the model, for messages.
        variant: ``fp16`` for ``model.fp16.safetensors``.
        use_safetensors: True or False allow only safetensors or only pickles.
    """

    directory: Path
    label: str
    variant: str | None = None
    use_safetensors: bool | None = None

    def open(self) -> TensorSource | None:
        """The tensors; None where the host would look for something else.

        ``model.safetensors`` comes before an index of shards, which an earlier save may have left there, and safetensors
        come before pickles.

        Raises:
            CheckpointMismatchError: for a broken file or index.
            ModelPoolError: for a merged model.
        """
        self.check_unmerged()
        config = self._configuration()
        if config.get("transformers_weights"):
            return None
        for stem, ending, kind, ruled_out_by in _KINDS:
            if self.use_safetensors is ruled_out_by:
                continue
            names = _named(stem, ending, self.variant)
            single, index = (self.directory / name for name in names)
            if single.exists():
                return _decoded(kind([single], self.label), config)
            if index.exists():
                return _decoded(_sharded(kind, index, self.label), config)
        return None

    def check_unmerged(self) -> None:
        """What is to be merged, or stands under a merge, must be a model, and no merged one of this package.

        Raises:
            ModelPoolError: if it is merged.
            CheckpointMismatchError: if the configuration is no JSON.
        """
        if is_marked(self._configuration()):
            raise ModelPoolError(
                f"{self.label}: {self.directory} is a merged model of this package, which holds changes of a base model and no model of "
                f"its own. Write a task of it as a checkpoint first (didi export {self.directory} OUT --form plain, or "
                "materialize(task).save_pretrained(OUT) in Python), or give what it was merged from."
            )

    def check_counts(self) -> None:
        """A configuration asks for no more layers than there are tensors beside it, nor for many more classes than any of them has rows.

        Raises:
            CheckpointMismatchError: naming file and setting; if the configuration is no JSON.
        """
        asked = {
            key: value
            for key, value in pairs(self._configuration())
            if type(value) is int and value > _most(key)
        }
        source = self.open() if asked else None
        if source is None:
            return
        shapes = [info.shape for info in source.infos().values()]
        for key, value in asked.items():
            found, what = len(shapes), f"are {len(shapes)} tensors"
            if key == _LABELS:
                found = max((shape[0] for shape in shapes if shape), default=0)
                what = f"have {found} rows at most"
            if value > found:
                raise CheckpointMismatchError(
                    f"{self.label}: {self.directory / 'config.json'} says {key}={value}, while the weights beside it {what}. Mend the "
                    "configuration, or download it again."
                )

    def check_quantization(self) -> None:
        """The configuration of a base model asks for no numbers that stand for others and are not read.

        Raises:
            CheckpointMismatchError: if it does; if it is no JSON.
        """
        if method := unread(self._configuration()):
            raise CheckpointMismatchError(
                f"{self.label}: {self.directory / 'config.json'} says that the model is quantized by {method}, whose values cannot be "
                "read and replaced. Give the model before it was quantized."
            )

    def _configuration(self) -> Mapping[str, Any]:
        """What a configuration says, if there is one."""
        file = self.directory / "config.json"
        if not file.is_file():
            return {}
        found = read_json(file, self.label, "the configuration of a model")
        return found if isinstance(found, Mapping) else {}


def _decoded(source: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """A checkpoint under the numbers that its codes stand for, where the host's classes decode them."""
    return Mxfp4Source.over(Float8Source.over(source, config), config)


def check_configured(place: Path, inside: str, label: str) -> None:
    """A directory, or a folder in it, of which a class of transformers is to make a model holds a configuration, or is an adapter.

    Otherwise transformers makes a model of the class's default settings, which may have billions of parameters.

    Args:
        label: of the model, for messages.

    Raises:
        ModelPoolError: if it is neither.
    """
    home = place / inside
    told = (home / "config.json").is_file() or (place / CONFIG).is_file()
    if place.is_dir() and not told:
        raise ModelPoolError(
            f"{label}: {home} has no config.json, which says what model its weights are of. Download or write it again, or give the "
            "directory that holds it."
        )


def _most(key: str) -> float:
    """Up to which value a setting is nobody's concern here."""
    if key == _LABELS:
        return _MANY_LABELS
    return _FEW if _COUNTS.fullmatch(key) else math.inf


def pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys of nested objects, with their values."""
    left = [value]  # of any depth
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            yield from value.items()
            left += value.values()
        elif isinstance(value, list):
            left += value


def index_files(variant: str | None = None) -> list[str]:
    """Names of the indices of shards."""
    return [_named(stem, ending, variant)[1] for stem, ending, *_ in _KINDS]


def _named(stem: str, ending: str, variant: str | None) -> tuple[str, str]:
    """Names of a single file, and of the index of shards."""
    middle = f".{variant}" if variant else ""
    return f"{stem}{middle}.{ending}", f"{stem}.{ending}.index{middle}.json"


def beside(name: Any) -> bool:
    """Whether a value names a file in the same directory."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


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
    outside = [name for name in shards if not (beside(name) and name.isprintable())]
    if outside:
        raise CheckpointMismatchError(
            f"{label}: {index} names {outside[0]!r}, expected files beside it. Download it again, from a source that you trust."
        )
    return set(names), [index.parent / name for name in shards]
