"""Weights in files, read tensor by tensor: safetensors and state dicts of torch, held against what was opened."""

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointMismatchError
from .sources import TensorInfo, TensorSource, described, faults_of, resolved
from .watched import Watched

#: Files are mapped anew after so many bytes read from a model.
MAPPED_BYTES = 2**25
#: What a tensor may map beyond itself: systems cache files in pages of up to this size, and map them whole.
PAGE_BYTES = 2**21

#: Types that files hold, by safetensors' names.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
STORED = frozenset(DTYPES.values())
#: Powers of two, the scales of other float8; None where torch does not have them.
E8M0 = getattr(torch, "float8_e8m0fnu", None)
_READ = {**DTYPES, "F8_E8M0": E8M0}


#: Bytes by which the tensors of a pickle may say that they are larger than what is stored of them.
SPREAD_BYTES = 2**24


class FilesSource(TensorSource):
    """Tensors in files that are watched."""

    def __init__(self, label: str):
        self.label = label
        self._files: dict[str, Path] = {}
        self._infos: dict[str, TensorInfo] = {}
        self.watched = Watched(label)

    def _glimpsed(self) -> list[str]:
        return self.watched.glimpses

    @property
    def identity(self) -> dict[str, str]:
        return self.watched.identity


class SafetensorsSource(FilesSource):
    """One or several safetensors files, read tensor by tensor.

    Files are mapped into memory, and mapped anew after every :data:`MAPPED_BYTES` so that what was read is let go.

    Raises:
        CheckpointMismatchError: if a file is no whole safetensors file, or changes while it is read.
    """

    def __init__(self, files: Sequence[Path], label: str):
        super().__init__(label)
        self._open: dict[Path, Any] = {}
        self._served, self._touched = 0, set[Path]()
        for file in files:
            self.watched.opened(file)
            handle = self._open[file] = self._mapped(file)
            for name in handle.keys():
                view, self._files[name] = handle.get_slice(name), file
                shape, dtype = tuple(view.get_shape()), _READ.get(view.get_dtype())
                self._infos[name] = TensorInfo(shape, dtype)

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        self.watched.check(file)  # of a file cut short not even an error would be left
        tensor = self._open[file].get_tensor(name)
        self.watched.check(file)
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


class PickleSource(FilesSource):
    """State dicts written by ``torch.save``, memory-mapped and read with ``weights_only=True``.

    Raises:
        CheckpointMismatchError: if a file is no state dict, or changes while it is read.
    """

    def __init__(self, files: Sequence[Path], label: str):
        super().__init__(label)
        self._tensors: dict[str, Tensor] = {}
        self.unused = {}
        for file in files:
            self.watched.opened(file)
            tensors, beside = _state_dict(file, label)
            self._tensors |= tensors
            self._files |= dict.fromkeys(tensors, file)
            self.unused |= dict.fromkeys(beside, "beside the state dict's tensors")
        self._infos, self.faults = described(self._tensors), faults_of(self._tensors)

    def read(self, name: str) -> Tensor:
        self.watched.check(self._files[name])
        value = self._tensors[name].clone()
        self.watched.check(self._files[name])
        return value


def _state_dict(file: Path, label: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a pickle; other plain values beside them (a step, a list of classes) are none of the model's.

    Returns:
        tensors by name; names of other values that hold some.
    """

    def refused(fault: str) -> CheckpointMismatchError:
        way_out = "Save the model's state dict as safetensors."
        return CheckpointMismatchError(f"{label}: {file} {fault}. {way_out}")

    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of the format before torch 1.6, which cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a broken archive
        raise refused(f"cannot be read as a weights-only checkpoint ({error})") from error  # fmt: skip
    if not isinstance(state, Mapping):
        raise refused(f"holds a {type(state).__name__}, expected a state dict")
    nested = [k for k, v in state.items() if isinstance(v, Mapping) and v]
    tensors = {k: resolved(v) for k, v in state.items() if isinstance(v, Tensor)}
    if nested and not tensors:
        raise refused(f"holds dictionaries {nested[:4]}, expected tensors by name")
    if strange := [k for k in tensors if not isinstance(k, str)]:
        raise refused(f"holds {strange[:4]}, expected tensors by name")
    if large := [k for k, v in tensors.items() if _is_spread(v)]:
        raise refused(f"holds fewer values of {large[:4]} than their shapes say")
    return tensors, [str(k) for k, v in state.items() if k not in tensors and _deep(v)]


def _is_spread(tensor: Tensor) -> bool:
    """Whether values stand for so many entries each (``expand``) that a small file would take any room in memory."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return tensor.nbytes > tensor.untyped_storage().nbytes() + SPREAD_BYTES


def _deep(value: Any) -> bool:
    """Whether there are tensors within a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_deep, value))
    return isinstance(value, Tensor)


def read_settings(file: Path, label: str, what: str) -> dict[str, Any]:
    """A small file of a checkpoint that holds an object.

    Raises:
        CheckpointMismatchError: if it is not there, not JSON, or holds something else.
    """
    found = read_json(file, label, what)
    if not isinstance(found, dict):
        raise CheckpointMismatchError(
            f"{label}: {file} is not {what} (it holds no object). Download or write it again."
        )
    return found


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
