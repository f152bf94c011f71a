"""Task vectors of a pool: a base model and its T fine-tuned models, aligned and checked, read one tensor at a time.

A *source* (``sources.py``) gives tensors by the names of the base model's parameters. ``TaskVectors`` lines T sources up with the
base, finds every fault from shapes and dtypes alone, and sorts the tensors into classes (adapters, ``lora_adapter.py``, are
sources of what they change, as factors where they can):

- ``matrices``: two sides of at least 2 (a convolution is viewed as out x (in * kh * kw));
- ``vectors``: everything else that some task changed (biases, norms, class embeddings);
- ``untouched``: what no task changed; costs nothing.
"""

import fnmatch
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..errors import (
    CheckpointMismatchError,
    ModelPoolError,
    SettingsError,
    some,
    spelled,
)
from .alignment import check_alignment, floating, matches
from .file_sources import STORED
from .float8 import FLOAT8
from .renaming import aligned
from .sources import TensorInfo, TensorSource
from .tensor import ChangedTensor, matrix_shape
from .watched import Watched

#: Part of two names that is the same where one may have been meant by the other.
_NEARLY = 0.9


@dataclass(frozen=True)
class TaskVectors:
    """A base model and T fine-tuned models, aligned.

    Args:
        base: source of the base model.
        tuned: source per task; what an adapter does not hold is as in the base model.
        exclude: glob patterns of tensors left at the base model's value.
        as_vectors: glob patterns of 2-D tensors stored whole like vectors.
        own: glob patterns of tensors that are kept as each task has them (heads, encoders of one modality).
        buffers: names of the base model's buffers; statistics and counters are kept as each task has them.
        fresh: tensors of the base model that its checkpoint does not hold, so that they have no value to differ from.
        ignored: tensors that the base checkpoint holds but the base model does not load (the text tower of a whole
            CLIPModel, say); fine-tuned checkpoints may hold them too.
        loaded: the base model's tensors are those that it has in memory, not just all of its checkpoint.

    Raises:
        ModelPoolError: for no task.
        CheckpointMismatchError: listing every missing, extra, wrongly shaped or wrongly typed tensor of every
            checkpoint; nothing but headers has been read then.
    """

    base: TensorSource
    tuned: Mapping[str, TensorSource]
    exclude: tuple[str, ...] = ()
    as_vectors: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    buffers: frozenset[str] = frozenset()
    fresh: frozenset[str] = frozenset()
    ignored: Mapping[str, TensorInfo] = field(default_factory=dict)
    loaded: bool = True
    _sources: Mapping[str, TensorSource] = field(init=False, repr=False)

    def __post_init__(self):
        if not self.tuned:
            raise ModelPoolError(
                "There is no fine-tuned model, expected one at least. Add models to modelpool.models."
            )
        reference = floating(self.base)
        sources = {
            task: s if s.partial else aligned(s, reference)
            for task, s in self.tuned.items()
        }
        object.__setattr__(self, "_sources", sources)
        keys = ("exclude", "own", "fresh", "buffers", "ignored", "loaded")
        check_alignment(self.base, sources, **{key: getattr(self, key) for key in keys})
        stiff = [n for n, info in self.infos.items() if info.dtype in FLOAT8]
        if stiff:
            raise CheckpointMismatchError(
                f"The base model has {some(stiff)} in {self.infos[stiff[0]].dtype}, which cannot hold merged "
                f"values. Give it in bfloat16, or leave these tensors out with {spelled('exclude', '[...]')}."
            )
        known = {*self.base.infos(), *self._held, *self.ignored}
        states = {n for s in (self.base, *sources.values()) for n in s.extra}
        for key in ("exclude", "as_vectors", "own"):
            there = known | states if key == "exclude" else known
            for pattern in getattr(self, key):
                if not fnmatch.filter(there, pattern):
                    raise SettingsError(
                        f"{key}: no tensor matches {pattern!r}; there are names like {some(known)}."
                    )
                if key != "exclude" and (why := self._useless(key, pattern)):
                    raise SettingsError(
                        f"{key}: {pattern!r} does nothing, since it matches nothing but {why}. Take it out, or name other tensors."
                    )

    def _useless(self, key: str, pattern: str) -> str | None:
        """Tensors on which a pattern has no effect, and why, where it matches nothing else."""
        infos = self.base.infos() | {
            n: i for s in self._sources.values() for n, i in s.infos().items()
        }
        found = fnmatch.filter({*infos, *self.ignored}, pattern)
        names = [n for n in found if n not in self.ignored]
        if not names:
            return f"{some(found)}, which the base model does not load"
        excluded = [n for n in names if matches(n, self.exclude)]
        if names == excluded:
            return f"{some(names)}, which exclude leaves out"
        if key == "own":
            return None
        own = [n for n in names if n not in excluded and matches(n, self.own)]
        whole = [n for n in names if min(matrix_shape(infos[n].shape)) < 2]
        if {*names} - {*excluded, *own, *whole}:
            return None
        return f"{some(names)}, which are stored whole anyway, own or left out"

    @property
    def tasks(self) -> list[str]:
        return list(self.tuned)

    @cached_property
    def _held(self) -> set[str]:
        return set().union(*(source.infos() for source in self._sources.values()))

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """The mergeable tensors: floating point, not excluded, held by fine-tuned checkpoints, no task's own; sorted by name."""
        return {
            name: info
            for name, info in sorted(floating(self.base).items())
            if name in self._held
            and name not in self.own_infos
            and not matches(name, self.exclude)
        }

    @cached_property
    def own_infos(self) -> dict[str, TensorInfo]:
        """The tensors that are kept as each task has them, sorted by name, as the first task describes them."""
        base, found = self.base.infos(), {}
        for name in sorted(self._held - set(self.ignored)):
            if matches(name, self.exclude):
                continue
            infos = self.own_by_task(name)
            other = name not in base or any(i.shape != base[name].shape for i in infos)
            special = name in self.fresh or name in self.buffers
            if other or special or not base[name].floating or matches(name, self.own):
                found[name] = infos[0]
        return found

    @property
    def _named(self) -> dict[str, TensorSource]:
        """All sources by name; the base model by its label where a task is called as it is."""
        name = "the base model"
        name = self.base.label if name in self._sources else name
        return {name: self.base, **self._sources}

    @property
    def identity(self) -> dict[str, str]:
        """Facts that tell these checkpoints from others, by model and file; values of live models are looked through for them.

        Paths are told from the directory that holds all files: however it is spelled, and wherever it is moved.
        """
        found = [
            (model, file, told)
            for model, source in self._named.items()
            for file, told in source.identity.items()
        ]
        homes = [os.path.dirname(file) for _, file, _ in found if os.path.isabs(file)]
        home = os.path.commonpath(homes) if homes else ""
        return {
            ", ".join(filter(None, (model, file.removeprefix(home).lstrip("/")))): told
            for model, file, told in found
        }

    @property
    def glimpses(self) -> dict[str, str]:
        """By model a checksum of headers and of some of its content."""
        return {model: source.glimpse() for model, source in self._named.items()}

    def take_digests(self, ranks: Ranks) -> None:
        """Have the ranks share the work of :attr:`identity`; called by all of them."""
        for source in (self.base, *self._sources.values()):
            source.take_digests(ranks)

    @property
    def watched(self) -> dict[str, Watched]:
        """The files of every model that is read from some."""
        found = {model: source.watched for model, source in self._named.items()}
        return {model: files for model, files in found.items() if files is not None}

    def unused(self, task: str) -> Mapping[str, str]:
        """Tensors of a checkpoint that the model does not take from it, and why."""
        known, source = self.base.infos(), self._sources[task]
        other = f"not loaded by the base model {self.base.label}"
        ignored = [n for n in source.infos() if n in self.ignored and n not in known]
        return {**source.unused, **dict.fromkeys(ignored, other)}

    @property
    def unused_of_base(self) -> dict[str, str]:
        """Tensors of the base model's checkpoint that the model does not take from it, and why."""
        ignored = dict.fromkeys(sorted(self.ignored), "not loaded by the base model")
        return {**self.base.unused, **ignored}

    @property
    def misnamed(self) -> dict[str, str]:
        """Tensors that the base model's checkpoint lacks and fine-tuned ones hold, and what it holds instead, called nearly so."""
        found, known = {}, sorted(self.ignored)
        for name in sorted(self.fresh & self._held):
            for other in get_close_matches(name, known, n=1, cutoff=_NEARLY):
                found[name] = other
        return found

    def excluded(self, task: str) -> list[str]:
        """Tensors of a checkpoint that are left out by ``exclude``."""
        return [n for n in self._sources[task].infos() if matches(n, self.exclude)]

    def own_by_task(self, name: str) -> list[TensorInfo]:
        """Header of a tensor in every task that holds it."""
        held = (source.infos().get(name) for source in self._sources.values())
        return [info for info in held if info is not None]

    def own_value(self, name: str, task: str) -> Tensor | None:
        """A task's own tensor; None where it is the base model's, to the bit."""
        source = self._sources[task]
        if name not in source.infos():
            return None
        base = self.base.read(name) if name in self.base.infos() else None
        value = source.read(name) if base is None else source.applied(name, base)
        if base is not None and name not in self.fresh:
            same = value.shape == base.shape and value.dtype == base.dtype
            if same and value.equal(base):
                return None
        if value.dtype not in STORED:
            raise CheckpointMismatchError(
                f"{task}: {name} is of {value.dtype}, which files do not hold, and differs from the base model's. Convert it, "
                f"or leave it out with {spelled('exclude', '[...]')}."
            )
        return value

    def ordered(self, tasks: Sequence[str]) -> "TaskVectors":
        """These task vectors with tasks in the given order."""
        return replace(self, tuned={task: self.tuned[task] for task in tasks})

    def tuned_dtype(self, name: str) -> torch.dtype:
        """The type in which fine-tuned checkpoints store a tensor; one that holds them all where they differ."""
        types = {info.dtype for info in self.own_by_task(name) if info.floating}
        if not types:
            return self.infos[name].dtype
        return functools.reduce(torch.promote_types, sorted(types, key=str))

    def bits(self, name: str) -> int:
        """Of one fine-tuned model's tensor, in the type in which checkpoints store it."""
        return TensorInfo(self.infos[name].shape, self.tuned_dtype(name)).bits

    def is_matrix(self, name: str) -> bool:
        m, n = matrix_shape(self.infos[name].shape)
        return min(m, n) >= 2 and not matches(name, self.as_vectors)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> ChangedTensor:
        """One tensor of all models, read when it is asked for."""
        sources = [self._sources[task] for task in self.tasks]
        dtype, info = self.tuned_dtype(name), self.infos[name]
        return ChangedTensor(name, info, self.base, sources, dtype, device)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes to be read of every tensor, merged or a task's own, of all models; of adapters, those of what they change."""
        models = 1 + len(self.tuned)
        found = {n: info.bits // 8 * models for n, info in self.infos.items()}
        for name in self.own_infos:
            found[name] = sum(info.bits // 8 for info in self.own_by_task(name))
        return found

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """All task vectors of one tensor in float32, (T, *shape)."""
        return self.tensor(name, device).stacked()

    def ranks(self, name: str) -> list[int | None]:
        """Per task, of the factors that a task vector is given as; None where it is the difference of two tensors."""
        return [self._sources[task].rank(name) for task in self.tasks]

    def factored(self, name: str) -> bool:
        """Whether no task changes the tensor but by an adapter's factors."""
        return None not in self.ranks(name)

    def joint_rank(self, name: str) -> int:
        """The largest rank that a sum of task vectors can have."""
        full, ranks = min(matrix_shape(self.infos[name].shape)), self.ranks(name)
        return full if None in ranks else min(sum(ranks), full)
