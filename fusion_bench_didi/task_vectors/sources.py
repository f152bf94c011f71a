"""Where tensors come from: live modules and files, described without being read, under the base model's names."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointMismatchError
from ..lowrank.factors import LowRankFactors

#: Files are mapped anew after so many bytes read from a model.
MAPPED_BYTES = 2**25
#: What a tensor may map beyond itself: systems cache files in pages of up to this size, and map them whole.
PAGE_BYTES = 2**21

#: safetensors' names of floating-point types
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells of one tensor; ``dtype`` is None for integer and boolean types."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TensorSource(ABC):
    """Named tensors of one model that are described without being read.

    Attributes:
        label: for messages.
        partial: what it does not hold is as in the base model.
        faults: what cannot be merged, by name, "" for the whole; found from headers.
    """

    label: str
    partial: bool = False
    faults: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """What the headers tell, by name."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The value of a tensor."""

    def rank(self, name: str) -> int | None:
        """Of a change that is given as factors: 0 for no change, None where the tensor is given by its value."""
        return None

    def factors(self, name: str) -> LowRankFactors:
        """The change of a matrix that :meth:`rank` is of, (m, r) (r, n) in float32."""
        raise KeyError(name)

    def applied(self, name: str, base: Tensor) -> Tensor:
        """The value of a tensor whose value in the base model is ``base``."""
        return self.read(name)


class ModuleSource(TensorSource):
    """The parameters and floating-point buffers of a live module; tied parameters appear once."""

    def __init__(self, module: nn.Module, label: str):
        self.label = label
        kept = set(module.state_dict(keep_vars=True))
        self._tensors = {
            name: tensor.detach()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if name in kept
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(
                tuple(t.shape), t.dtype if t.dtype.is_floating_point else None
            )
            for name, t in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class SafetensorsSource(TensorSource):
    """One or several safetensors files, read tensor by tensor.

    Files are mapped into memory, and mapped anew after every :data:`MAPPED_BYTES` so that what was read is let go.

    Raises:
        CheckpointMismatchError: if a file is no whole safetensors file.
    """

    def __init__(self, files: Sequence[Path], label: str):
        self.label = label
        self._files: dict[str, Path] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        self._served, self._touched = 0, set[Path]()
        for file in files:
            try:
                self._open[file] = handle = safe_open(file, framework="pt")
                names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointMismatchError(
                    f"{label}: {file} is not a whole safetensors file ({error}). Download or write it again."
                ) from error
            for name in names:
                view = handle.get_slice(name)
                self._files[name] = file
                self._infos[name] = TensorInfo(
                    tuple(view.get_shape()), _DTYPES.get(view.get_dtype())
                )

    @classmethod
    def of_directory(cls, directory: Path, label: str) -> "SafetensorsSource | None":
        """The weights of a ``save_pretrained`` directory, or None if it holds no safetensors."""
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            parts = set(json.loads(index.read_text())["weight_map"].values())
            return cls([directory / p for p in sorted(parts)], label)
        single = directory / "model.safetensors"
        return cls([single], label) if single.is_file() else None

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        tensor = self._open[file].get_tensor(name)
        self._touched.add(file)
        self._served += tensor.nbytes + PAGE_BYTES
        if self._served > MAPPED_BYTES:
            touched, self._touched, self._served = self._touched, set(), 0
            for file in tuple(touched):
                self._open[file] = safe_open(file, framework="pt")
        return tensor


class RenamedSource(TensorSource):
    """A source whose names differ from the base model's by one prefix (``vision_model.`` and the like)."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        self.label = source.label
        self._source, self._names = source, names

    def infos(self) -> Mapping[str, TensorInfo]:
        infos = self._source.infos()
        return {name: infos[inner] for name, inner in self._names.items()}

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])


def aligned(source: TensorSource, reference: Iterable[str]) -> TensorSource:
    """The source under the reference's names, if a prefix added or dropped makes more of them meet."""
    found = source.infos()
    names = renaming(found, reference)
    if all(new == old for new, old in names.items()) and len(names) == len(found):
        return source
    return RenamedSource(source, names)


def renaming(found: Iterable[str], reference: Iterable[str]) -> dict[str, str]:
    """The names found, by what the reference calls them: with the prefix added or dropped that makes most of them meet.

    transformers writes ``vision_model.`` in front of a CLIP tower's names in some versions and not in others; a
    checkpoint of a whole CLIPModel also holds the text tower.
    """
    found, wanted = list(found), set(reference)

    def meeting(names: Mapping[str, str]) -> int:
        return len(wanted & set(names))

    best = {name: name for name in found}
    if meeting(best) == min(len(wanted), len(found)):
        return best
    prefixes = {name.split(".", 1)[0] + "." for name in (*found, *sorted(wanted))}
    for prefix in sorted(prefixes):
        dropped = {
            name.removeprefix(prefix): name for name in found if name.startswith(prefix)
        }
        added = {prefix + name: name for name in found}
        best = max(best, dropped, added, key=meeting)
    return best


class PickleSource(ModuleSource):
    """A state dict written by ``torch.save``, memory-mapped and read with ``weights_only=True``."""

    def __init__(self, file: Path, label: str):
        self.label = label
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types for a broken archive
            raise CheckpointMismatchError(
                f"{label}: {file} cannot be read as a weights-only checkpoint ({error}). Save it as safetensors."
            ) from error
        self._tensors = dict(state)
