"""Aligned, lazy, checked reading of a base model and its T fine-tuned models, one tensor at a time.

A *source* (``sources.py``) gives tensors by the names of the base model's parameters. ``TaskVectors`` lines T sources up with the base,
finds every fault from shapes and dtypes alone, and sorts the tensors into classes:

- ``matrices``: two sides of at least 2 (a convolution is viewed as out x (in * kh * kw));
- ``vectors``: everything else that some task changed (biases, norms, class embeddings);
- ``untouched``: what no task changed; costs nothing.
"""

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .errors import CheckpointMismatchError, ModelPoolError, NonFiniteError
from .lowrank.blocks import energy_of_difference
from .parallel import ordered_map, workers_for
from .sources import TensorInfo, TensorSource, aligned

#: Task vectors of one tensor are stacked in memory up to this size.
STACK_BYTES = 2**28


@dataclass(frozen=True)
class Scan:
    """What one read of every tensor tells.

    Args:
        energy: per tensor, (T,) squared norms of the task vectors.
        changed: names that at least one task changed.
    """

    energy: Mapping[str, Tensor]

    @property
    def changed(self) -> list[str]:
        return [name for name, e in self.energy.items() if bool((e > 0).any())]


@dataclass(frozen=True)
class TaskVectors:
    """A base model and T fine-tuned models, aligned.

    Args:
        base: source of the base model.
        tuned: source per task.
        exclude: glob patterns of tensors left at the base model's value.
        as_vectors: glob patterns of 2-D tensors stored whole like vectors.
        ignored: tensors that the base checkpoint holds but the base model does not load (the text tower of a whole
            CLIPModel, say); fine-tuned checkpoints may hold them too.

    Raises:
        ModelPoolError: for fewer than two tasks.
        CheckpointMismatchError: listing every missing, extra, wrongly shaped or wrongly typed tensor of every
            checkpoint; nothing but headers has been read then.
    """

    base: TensorSource
    tuned: Mapping[str, TensorSource]
    exclude: tuple[str, ...] = ()
    as_vectors: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    _sources: Mapping[str, TensorSource] = field(init=False, repr=False)

    def __post_init__(self):
        if len(self.tuned) < 2:
            raise ModelPoolError(
                f"Merging needs at least two fine-tuned models, the pool has {len(self.tuned)}: "
                f"{list(self.tuned)}. Add models to modelpool.models."
            )
        reference = self._floating(self.base)
        sources = {
            task: aligned(source, reference) for task, source in self.tuned.items()
        }
        object.__setattr__(self, "_sources", sources)
        self._check(reference)

    @property
    def tasks(self) -> list[str]:
        return list(self.tuned)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """The mergeable tensors: floating point, not excluded, held by the fine-tuned checkpoints; sorted by name."""
        held = set().union(*(source.infos() for source in self._sources.values()))
        return {
            name: info
            for name, info in sorted(self._floating(self.base).items())
            if name in held and not _matches(name, self.exclude)
        }

    def ordered(self, tasks: Sequence[str]) -> "TaskVectors":
        """The same with tasks in the given order."""
        return replace(self, tuned={task: self.tuned[task] for task in tasks})

    def tuned_dtype(self, name: str) -> torch.dtype:
        """The type in which the first fine-tuned checkpoint that holds the tensor stores it."""
        for task in self.tasks:
            info = self._sources[task].infos().get(name)
            if info is not None and info.dtype is not None:
                return info.dtype
        return self.infos[name].dtype

    def is_matrix(self, name: str) -> bool:
        m, n = matrix_shape(self.infos[name].shape)
        return min(m, n) >= 2 and not _matches(name, self.as_vectors)

    def read_base(self, name: str) -> Tensor:
        return self.base.read(name)

    def read_tuned(self, name: str, task: str) -> Tensor:
        return self._sources[task].read(name)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """All task vectors of one tensor in float32, (T, *shape)."""
        base = self.base.read(name).to(device, torch.float32)
        stack = base.new_empty(len(self.tasks), *base.shape)
        for tau, task in zip(stack, self.tasks):
            torch.sub(self.read_tuned(name, task).to(device), base, out=tau)
        return stack

    def matrices(
        self, name: str, device: torch.device | str = "cpu"
    ) -> "Sequence[Tensor]":
        """The T task vectors of one tensor as float32 matrices; stacked unless they are large, then read one at a time."""
        shape = matrix_shape(self.infos[name].shape)
        if self.one_by_one(name):
            return _OneByOne(self, name, torch.device(device), shape)
        return self.read(name, device).view(-1, *shape)

    def one_by_one(self, name: str) -> bool:
        """Whether the task vectors of a tensor are too large to be stacked."""
        return 4 * len(self.tasks) * self.infos[name].numel > STACK_BYTES

    def terms(self, name: str, task: str) -> tuple[Tensor, Tensor]:
        """The two matrices (m, n), of the types in which they are stored, whose difference is a task vector."""
        shape = matrix_shape(self.infos[name].shape)
        pair = self.read_tuned(name, task), self.read_base(name)
        return pair[0].reshape(shape), pair[1].reshape(shape)

    def large(self, name: str) -> bool:
        """Whether one task vector of the tensor alone takes so much memory that only one is worked on at a time."""
        return 4 * self.infos[name].numel > STACK_BYTES // 2

    def _read_one(self, name: str, task: str, device) -> Tensor:
        tuned = self.read_tuned(name, task).to(device, torch.float32, copy=True)
        return tuned.sub_(self.read_base(name).to(device))

    def scan(self, device: torch.device | str = "cpu") -> Scan:
        """Read everything once: finite? changed? how much?

        Raises:
            NonFiniteError: naming every task and tensor with NaN or infinity.
            ModelPoolError: if no task differs from the base model.
        """
        energies = ordered_map(
            lambda name: self._energies(name, torch.device(device)),
            self.infos,
            workers=workers_for(device),
        )
        energy, faults = dict(zip(self.infos, energies)), []
        for name, e in energy.items():
            if not bool(e.isfinite().all()):
                faults += self._non_finite(name)
        if faults:
            raise NonFiniteError(
                "Some checkpoints hold NaN or infinity:\n  "
                + "\n  ".join(faults)
                + "\nFix or leave out these models; a single tensor can be left out with method.exclude=[...]."
            )
        scan = Scan(energy)
        if not scan.changed:
            raise ModelPoolError(
                f"All task vectors are zero: {', '.join(self.tasks)} equal the base model {self.base.label} in every "
                "tensor. Check that the pool does not load the base weights for every task."
            )
        return scan

    def _energies(self, name: str, device: torch.device) -> Tensor:
        """(T,) squared norms; no task vector is formed."""
        pairs = (self.terms(name, task) for task in self.tasks)
        energies = [energy_of_difference(w.to(device), b.to(device)) for w, b in pairs]
        return torch.stack(energies).cpu()

    def _non_finite(self, name: str) -> list[str]:
        if not bool(self.read_base(name).float().isfinite().all()):
            return [f"the base model {self.base.label}: {name}"]
        faults = []
        for task in self.tasks:
            bad = ~self.read_tuned(name, task).float().isfinite()
            if bool(bad.any()):
                faults.append(f"{task}: {name} ({int(bad.sum())} entries)")
        return faults or [f"{name}: differences to the base model overflow float32"]

    @staticmethod
    def _floating(source: TensorSource) -> dict[str, TensorInfo]:
        return {n: i for n, i in source.infos().items() if i.dtype is not None}

    def _check(self, reference: Mapping[str, TensorInfo]) -> None:
        infos = {task: s.infos() for task, s in self._sources.items()}
        # what no checkpoint holds is untouched by every task
        expected = set(reference) & set().union(*infos.values())
        if not expected:
            raise CheckpointMismatchError(
                f"No tensor of {self.base.label} appears in any fine-tuned checkpoint: expected names like "
                f"{_some(reference)}, found {_some(set().union(*infos.values()))}. The models are of another architecture."
            )
        faults = [
            f"{task}: {fault}"
            for task, found in infos.items()
            for fault in self._faults(expected, reference, found)
        ]
        if faults:
            raise CheckpointMismatchError(
                "The fine-tuned models do not line up with the base model:\n  "
                + "\n  ".join(faults)
                + "\nUse models of one architecture, or leave tensors out with method.exclude=[...]."
            )

    def _faults(
        self,
        expected: set[str],
        reference: Mapping[str, TensorInfo],
        found: Mapping[str, TensorInfo],
    ) -> Iterator[str]:
        missing = {n for n in expected - set(found) if not _matches(n, self.exclude)}
        extra = {
            name
            for name, info in found.items()
            if info.dtype is not None
            and name not in reference
            and name not in self.ignored
            and not _matches(name, self.exclude)
        }
        if missing:
            yield f"{len(missing)} tensors missing: {_some(missing)}"
        if extra:
            yield (
                f"{len(extra)} tensors that the base model {self.base.label} does not have: {_some(extra)}"
            )
        for name in sorted(expected & set(found)):
            have, want = found[name], reference[name]
            if _matches(name, self.exclude):
                continue
            if have.shape != want.shape:
                yield f"{name} is {have.shape}, the base model has {want.shape}"
            elif have.dtype is None:
                yield f"{name} is of an integer type, the base model has {want.dtype}"


@dataclass(frozen=True)
class _OneByOne(Sequence):
    """Task vectors of one tensor, read when they are asked for."""

    task_vectors: TaskVectors
    name: str
    device: torch.device
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.task_vectors.tasks)

    def __getitem__(self, index: int) -> Tensor:
        task = self.task_vectors.tasks[index]
        tau = self.task_vectors._read_one(self.name, task, self.device)
        return tau.view(self.shape)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor viewed as out x everything else; vectors are 1 x n."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _some(names: Iterable[str], count: int = 4) -> str:
    names = sorted(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
