"""Where tensors come from: live modules and files, described without being read, under the base model's names."""

import functools
import hashlib
import json
import math
import os
import pickle
import stat
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
from .digests import digests

#: What torch calls the state of a module that is none of its tensors.
EXTRA_STATE = "_extra_state"
#: Files are mapped anew after so many bytes read from a model.
MAPPED_BYTES = 2**25
#: What a tensor may map beyond itself: systems cache files in pages of up to this size, and map them whole.
PAGE_BYTES = 2**21

#: safetensors' names of types
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
#: Types that files hold.
STORED = frozenset(_DTYPES.values())


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells of one tensor; ``dtype`` is None for a type that torch does not have."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        return 8 * self.numel * self.dtype.itemsize

    @property
    def floating(self) -> bool:
        """Whether it can be merged."""
        return self.dtype is not None and self.dtype.is_floating_point


class TensorSource(ABC):
    """Named tensors of one model that are described without being read.

    Attributes:
        label: for messages.
        partial: what it does not hold is as in the base model.
        faults: what cannot be merged, by name, "" for the whole; found from headers.
        unused: tensors that the model does not take from the checkpoint, and why.
        extra: what a live model keeps beside its tensors (``get_extra_state``), as bytes.
    """

    label: str
    partial: bool = False
    faults: Mapping[str, str] = MappingProxyType({})
    unused: Mapping[str, str] = MappingProxyType({})
    extra: Mapping[str, bytes] = MappingProxyType({})

    @abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """What the headers tell, by name."""

    @property
    def identity(self) -> dict[str, str]:
        """What tells these tensors from others of the same headers, by file, as far as files tell; values of live models."""
        return {"": digest_of(repr(sorted(self.infos().items())).encode())}

    @property
    def digests(self) -> Mapping[str, str]:
        """Checksums of values by name, taken once; none where files tell enough."""
        return {}

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The value of a tensor."""

    def check(self) -> None:
        """The files are those that were opened.

        Raises:
            CheckpointMismatchError: naming one that is not.
        """

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
    """The parameters and buffers of a live module; tied parameters appear once.

    Args:
        files: that it was loaded from, and into which its tensors may still be mapped.

    Attributes:
        config: what it says of itself; None if nothing.
    """

    def __init__(
        self, module: nn.Module, label: str, files: TensorSource | None = None
    ):
        self.label, self._loaded_from = label, files
        self.config = getattr(module, "config", None)
        state = module.state_dict(keep_vars=True)
        self._tensors = {
            name: tensor.detach()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if name in state
        }
        self._infos = _described(self._tensors)
        self.faults = {n: f for n, t in self._tensors.items() if (f := fault_of(t))}
        self.extra = {
            name: pickle.dumps(value)
            for name, value in state.items()
            if name.rpartition(".")[2] == EXTRA_STATE
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        self.check()
        return self._tensors[name]

    def check(self) -> None:
        if self._loaded_from is not None:
            self._loaded_from.check()

    @functools.cached_property
    def digests(self) -> Mapping[str, str]:
        self.check()
        return digests(self._tensors)

    @property
    def identity(self) -> dict[str, str]:
        content = (super().identity[""], sorted(self.digests.items()))
        return {"in memory": digest_of(repr(content).encode())}


def _described(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {
        n: TensorInfo(() if t.is_nested else tuple(t.shape), t.dtype)
        for n, t in tensors.items()
    }


def digest_of(content: bytes) -> str:
    """A short name for some bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def fault_of(tensor: Tensor) -> str | None:
    """Why the values of a tensor cannot be read."""
    if tensor.is_meta:
        return "is without values (on the meta device, as in a model that is loaded in part)"
    if tensor.is_nested:
        return "is a nested tensor, expected one of plain rows"
    if tensor.layout != torch.strided:
        return f"is of layout {tensor.layout}, expected a dense tensor"
    return None


class Watched:
    """Files that must not change while a merge reads them: what was opened is held against what is there.

    Raises:
        CheckpointMismatchError: if a file is none, or is another one than when it was opened.
    """

    def __init__(self, label: str):
        self._label = label
        self._seen: dict[Path, tuple] = {}

    def opened(self, file: Path) -> None:
        """Note a file before it is opened."""
        self._seen[file] = self._stamp(file)

    @property
    def identity(self) -> dict[str, str]:
        """Size and date of every file."""
        return {
            str(file): f"{stamp[2]} bytes of {stamp[3] / 1e9:.6f}"
            for file, stamp in self._seen.items()
        }

    def check_all(self) -> None:
        """All of them are."""
        for file in self._seen:
            self.check(file)

    def check(self, file: Path) -> None:
        """It is still the file that was opened, of the same size and date."""
        if self._stamp(file) != self._seen[file]:
            raise CheckpointMismatchError(
                f"{self._label}: {file} changed while it was read; what was read so far is of no use. Start again once nothing "
                "writes to it."
            )

    def _stamp(self, file: Path) -> tuple:
        try:
            found = os.stat(file)
        except OSError as error:
            raise CheckpointMismatchError(
                f"{self._label}: {file} cannot be read ({error}). Download or write it again."
            ) from error
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointMismatchError(
                f"{self._label}: {file} is no file. Download or write it again."
            )
        times = found.st_mtime_ns, found.st_ctime_ns
        return found.st_dev, found.st_ino, found.st_size, *times


class SafetensorsSource(TensorSource):
    """One or several safetensors files, read tensor by tensor.

    Files are mapped into memory, and mapped anew after every :data:`MAPPED_BYTES` so that what was read is let go.

    Raises:
        CheckpointMismatchError: if a file is no whole safetensors file, or changes while it is read.
    """

    def __init__(self, files: Sequence[Path], label: str):
        self.label = label
        self._files: dict[str, Path] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        self._watched = Watched(label)
        self._served, self._touched = 0, set[Path]()
        for file in files:
            self._watched.opened(file)
            handle = self._open[file] = self._mapped(file)
            for name in handle.keys():
                view = handle.get_slice(name)
                self._files[name] = file
                self._infos[name] = TensorInfo(
                    tuple(view.get_shape()), _DTYPES.get(view.get_dtype())
                )

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def identity(self) -> dict[str, str]:
        return self._watched.identity

    def check(self) -> None:
        self._watched.check_all()

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        self._watched.check(file)  # of a file cut short not even an error would be left
        tensor = self._open[file].get_tensor(name)
        self._watched.check(file)
        self._touched.add(file)
        self._served += tensor.nbytes + PAGE_BYTES
        if self._served > MAPPED_BYTES:
            touched, self._touched, self._served = self._touched, set(), 0
            for file in tuple(touched):
                self._open[file] = self._mapped(file)
        return tensor

    def _mapped(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointMismatchError(
                f"{self.label}: {file} is not a whole safetensors file ({error}). Download or write it again."
            ) from error


class PickleSource(TensorSource):
    """State dicts written by ``torch.save``, memory-mapped and read with ``weights_only=True``.

    Raises:
        CheckpointMismatchError: if a file is no state dict, or changes while it is read.
    """

    def __init__(self, files: Sequence[Path], label: str):
        self.label = label
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._watched = Watched(label)
        unused: dict[str, str] = {}
        for file in files:
            self._watched.opened(file)
            tensors, beside = _state_dict(file, label)
            for name, value in tensors.items():
                self._tensors[name], self._files[name] = value, file
            unused.update(dict.fromkeys(beside, "beside the state dict's tensors"))
        self.unused = unused
        self._infos = _described(self._tensors)
        self.faults = {n: f for n, t in self._tensors.items() if (f := fault_of(t))}

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def identity(self) -> dict[str, str]:
        return self._watched.identity

    def check(self) -> None:
        self._watched.check_all()

    def read(self, name: str) -> Tensor:
        self._watched.check(self._files[name])
        return self._tensors[name].clone()


def _state_dict(file: Path, label: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a pickle; other plain values beside them (a step, a list of classes) are none of the model's.

    Returns:
        tensors by name; names of other values that hold some.
    """
    way_out = "Save the model's state dict as safetensors."
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of the format before torch 1.6, which cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a broken archive
        raise CheckpointMismatchError(
            f"{label}: {file} cannot be read as a weights-only checkpoint ({error}). {way_out}"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointMismatchError(
            f"{label}: {file} holds a {type(state).__name__}, expected a state dict (tensors by name). {way_out}"
        )
    nested = [k for k, v in state.items() if isinstance(v, Mapping) and v]
    tensors = {k: v.detach() for k, v in state.items() if isinstance(v, Tensor)}
    if nested and not tensors:
        raise CheckpointMismatchError(
            f"{label}: {file} holds dictionaries {nested[:4]}, expected tensors by name. {way_out}"
        )
    if strange := [k for k in tensors if not isinstance(k, str)]:
        raise CheckpointMismatchError(
            f"{label}: {file} holds {strange[:4]}, expected tensors by name. {way_out}"
        )
    return tensors, [str(k) for k, v in state.items() if k not in tensors and _deep(v)]


def _deep(value: Any) -> bool:
    """Whether there are tensors within a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_deep, value))
    return isinstance(value, Tensor)


class RenamedSource(TensorSource):
    """A source under other names.

    Args:
        names: new name -> name in the source; several may mean one tensor.
        unused: tensors of the source that have no new name, and why.
    """

    def __init__(
        self,
        source: TensorSource,
        names: Mapping[str, str],
        unused: Mapping[str, str] = MappingProxyType({}),
    ):
        self.label = source.label
        self.unused, self.extra = {**source.unused, **unused}, source.extra
        self.faults = {
            new: source.faults[old]
            for new, old in names.items()
            if old in source.faults
        }
        self._source, self._names = source, names
        infos = source.infos()
        self._infos = {name: infos[inner] for name, inner in names.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def identity(self) -> dict[str, str]:
        return self._source.identity

    def check(self) -> None:
        self._source.check()

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])


def aligned(source: TensorSource, reference: Iterable[str]) -> TensorSource:
    """The source under the reference's names, if a prefix added or dropped makes more of them meet."""
    found = source.infos()
    names = renaming(found, reference)
    if all(new == old for new, old in names.items()) and len(names) == len(found):
        return source
    dropped = set(found) - set(names.values())
    return RenamedSource(source, names, dict.fromkeys(dropped, "of another part"))


#: Names that are looked for at the ends of others.
_ENDS = 8


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
    prefixes |= {  # of layers deep within a model
        name.removesuffix(end)
        for end in sorted(wanted)[:_ENDS]
        for name in found
        if name.endswith(f".{end}")
    }
    for prefix in sorted(prefixes):
        dropped = {
            name.removeprefix(prefix): name for name in found if name.startswith(prefix)
        }
        added = {prefix + name: name for name in found}
        best = max(best, dropped, added, key=meeting)
    return best


def read_json(file: Path, label: str, what: str) -> Any:
    """A small file of a checkpoint.

    Raises:
        CheckpointMismatchError: if it is not there, or not JSON.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise ValueError("it is no file")
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointMismatchError(
            f"{label}: {file} is not {what} ({error}). Download or write it again."
        ) from error
