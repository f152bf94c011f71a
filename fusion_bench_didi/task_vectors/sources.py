"""Where tensors come from: described without being read, under the base model's names; those of live modules.

Files are in ``file_sources.py``, other names for the same tensors in ``renaming.py``.
"""

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.ownership import Crew
from ..distributed.ranks import ALONE, Ranks
from ..lowrank.factors import LowRankFactors
from .digests import digests, state_bytes
from .live_models import EXTRA_STATE, all_tensors
from .ties import tied_names
from .watched import Watched

#: Values of a live tensor that are looked at by a glimpse.
GLIMPSED = 64


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor from its header; ``dtype`` is None for a type that torch does not have."""

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
        """Whether the tensor can be merged."""
        return self.dtype is not None and self.dtype.is_floating_point


class TensorSource(ABC):
    """Named tensors of one model that are described without being read.

    Attributes:
        label: for messages.
        partial: what it does not hold is as in the base model.
        faults: what cannot be merged, by name, "" for the whole; found from headers.
        unused: tensors that the model does not take from the checkpoint, and why.
        extra: what a live model keeps beside its tensors (``get_extra_state``), as bytes.
        watched: the files, as they were when they were opened; None where there are none.
        digests: checksums of values by name, taken once; none where files tell enough.
    """

    label: str
    partial: bool = False
    faults: Mapping[str, str] = MappingProxyType({})
    unused: Mapping[str, str] = MappingProxyType({})
    extra: Mapping[str, bytes] = MappingProxyType({})
    watched: Watched | None = None
    digests: Mapping[str, str] = MappingProxyType({})
    _infos: Mapping[str, TensorInfo]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Headers by name."""
        return self._infos

    @property
    def identity(self) -> dict[str, str]:
        """What tells these tensors from others of the same headers, by file, as far as files tell; values of live models."""
        return {"": digest_of(repr(sorted(self.infos().items())).encode())}

    def glimpse(self) -> str:
        """A checksum of headers and of some of the content, taken at once, by which processes that each read a part see whether they
        read the same."""
        content = sorted(self.infos().items()), self._glimpsed()
        return digest_of(repr(content).encode())

    def _glimpsed(self) -> Any:
        """What the checksum is of beside the headers."""
        return None

    def take_digests(self, ranks: Ranks) -> None:
        """Have every rank take some of the checksums, and know all; called by all of them."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The value of a tensor."""

    def check(self) -> None:
        """The files are those that were opened.

        Raises:
            CheckpointMismatchError: naming one that is not.
        """
        if self.watched is not None:
            self.watched.check_all()

    def rank(self, name: str) -> int | None:
        """Rank of a change that is given as factors: 0 for no change, None where the tensor is given by its value."""
        return None

    def rests_on_base(self, name: str) -> bool:
        """Whether the value of a tensor is the base model's with a change, so that it is nowhere without that."""
        return self.rank(name) is not None

    def factors(self, name: str) -> LowRankFactors:
        """The change of a matrix that :meth:`rank` is of, (m, r) (r, n) in float32."""
        raise KeyError(name)

    def applied(self, name: str, base: Tensor) -> Tensor:
        """The value of a tensor whose value in the base model is ``base``."""
        return self.read(name)


class WrappedSource(TensorSource):
    """Another source some of whose tensors are given otherwise; its files, and what is said of them, are that one's.

    Args:
        infos: what is given.
    """

    def __init__(self, source: TensorSource, infos: Mapping[str, TensorInfo]):
        self.label, self.partial = source.label, source.partial
        self.faults, self.unused = source.faults, source.unused
        self.extra, self.watched = source.extra, source.watched
        self._source, self._infos = source, infos

    @property
    def identity(self) -> dict[str, str]:
        return self._source.identity

    def _glimpsed(self) -> str:
        return self._source.glimpse()

    def take_digests(self, ranks: Ranks) -> None:
        self._source.take_digests(ranks)


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
        self.label = label
        if files is not None:
            self.unused, self.watched = files.unused, files.watched
        self.config = getattr(module, "config", None)
        state, second = module.state_dict(keep_vars=True), tied_names(module)
        self._tensors = {
            name: resolved(tensor)
            for name, tensor in all_tensors(module).items()
            if name in state and name not in second
        }
        self._infos, self.faults = described(self._tensors), faults_of(self._tensors)
        self.extra = {
            name: state_bytes(value)
            for name, value in state.items()
            if name.rpartition(".")[2] == EXTRA_STATE
        }

    def read(self, name: str) -> Tensor:
        self.check()
        return self._tensors[name]

    def _glimpsed(self) -> list[tuple[str, str]]:
        tensors = {n: t.reshape(-1) for n, t in self._tensors.items() if n not in self.faults}  # fmt: skip
        some = {n: t[:: max(1, t.numel() // GLIMPSED)] for n, t in tensors.items()}
        return sorted(digests(some).items())

    @functools.cached_property
    def digests(self) -> Mapping[str, str]:
        return self._digests(ALONE)

    def take_digests(self, ranks: Ranks) -> None:
        self.digests = self._digests(ranks)

    def _digests(self, ranks: Ranks) -> dict[str, str]:
        self.check()
        tensors = {n: t for n, t in self._tensors.items() if n not in self.faults}
        crew = Crew.of(ranks, {name: t.nbytes for name, t in tensors.items()})
        found = ranks.gathered(digests({n: tensors[n] for n in crew.mine(tensors)}))
        self.check()
        return {name: found[name] for name in tensors}

    @property
    def identity(self) -> dict[str, str]:
        content = (super().identity[""], sorted(self.digests.items()))
        return {"in memory": digest_of(repr(content).encode())}


def resolved(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its values: views of others as conjugate or negative are worked out."""
    return tensor.detach().resolve_conj().resolve_neg()


def described(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Headers of tensors in memory."""
    return {
        n: TensorInfo(() if t.is_nested else tuple(t.shape), t.dtype)
        for n, t in tensors.items()
    }


def digest_of(content: bytes) -> str:
    """A short name for some bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def faults_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Why the values of some tensors in memory cannot be read."""
    faults = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            faults[name] = "is without values (on the meta device, as in a model that is loaded in part)"  # fmt: skip
        elif tensor.is_nested:
            faults[name] = "is a nested tensor, expected one of plain rows"
        elif tensor.layout != torch.strided:
            faults[name] = f"is of layout {tensor.layout}, expected a dense tensor"
    return faults
