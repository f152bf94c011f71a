"""Aligned, lazy, checked reading of a base model and its T fine-tuned models, one tensor at a time.

A *source* (``sources.py``) gives tensors by the names of the base model's parameters. ``TaskVectors`` lines T sources up with the base,
finds every fault from shapes and dtypes alone, and sorts the tensors into classes (adapters, ``adapters.py``, are sources
of what they change, as factors where they can):

- ``matrices``: two sides of at least 2 (a convolution is viewed as out x (in * kh * kw));
- ``vectors``: everything else that some task changed (biases, norms, class embeddings);
- ``untouched``: what no task changed; costs nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ModelPoolError, NonFiniteError
from ..lowrank.factors import LowRankFactors, Matrix, energy_of
from ..lowrank.row_blocks import Difference, squared_norms
from ..parallel import ordered_map, workers_for
from .alignment import check_alignment, floating, matches
from .lora_adapter import AdapterSource
from .scan import Scan
from .sources import TensorInfo, TensorSource, aligned

#: Task vectors of one tensor are stacked in memory up to this size.
STACK_BYTES = 2**28


@dataclass(frozen=True)
class TaskVectors:
    """A base model and T fine-tuned models, aligned.

    Args:
        base: source of the base model.
        tuned: source per task; what an adapter does not hold is as in the base model.
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
        reference = floating(self.base)
        sources = {
            task: s if isinstance(s, AdapterSource) else aligned(s, reference)
            for task, s in self.tuned.items()
        }
        object.__setattr__(self, "_sources", sources)
        check_alignment(self.base, sources, exclude=self.exclude, ignored=self.ignored)

    @property
    def tasks(self) -> list[str]:
        return list(self.tuned)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """The mergeable tensors: floating point, not excluded, held by the fine-tuned checkpoints; sorted by name."""
        held = set().union(*(source.infos() for source in self._sources.values()))
        return {
            name: info
            for name, info in sorted(floating(self.base).items())
            if name in held and not matches(name, self.exclude)
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
        return min(m, n) >= 2 and not matches(name, self.as_vectors)

    def read_base(self, name: str) -> Tensor:
        return self.base.read(name)

    def read_tuned(self, name: str, task: str) -> Tensor:
        source = self._sources[task]
        if isinstance(source, AdapterSource):
            return source.applied(name, self.read_base(name))
        return source.read(name)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """All task vectors of one tensor in float32, (T, *shape)."""
        base = self.base.read(name).to(device, torch.float32)
        stack = base.new_empty(len(self.tasks), *base.shape)
        for tau, task in zip(stack, self.tasks):
            factors = self._factors(name, task)
            if factors is None:
                torch.sub(self.read_tuned(name, task).to(device), base, out=tau)
            else:
                tau.copy_(factors.to(device).dense().view(tau.shape))
        return stack

    def matrices(
        self, name: str, device: torch.device | str = "cpu"
    ) -> "Sequence[Matrix]":
        """The T task vectors of one tensor as float32 matrices.

        Those of adapters are factors. Those of whole checkpoints are stacked, or read one at a time where they are large.
        """
        shape = matrix_shape(self.infos[name].shape)
        if self.one_by_one(name):
            return _OneByOne(self, name, torch.device(device), shape)
        if any(rank is not None for rank in self.ranks(name)):
            return list(_OneByOne(self, name, torch.device(device), shape))
        return self.read(name, device).view(-1, *shape)

    def one_by_one(self, name: str) -> bool:
        """Whether the task vectors of a tensor are too large to be stacked."""
        size = 4 * len(self.tasks) * self.infos[name].numel
        return size > STACK_BYTES and not self.factored(name)

    def terms(
        self, name: str, tasks: Sequence[str], device: torch.device | str = "cpu"
    ) -> list[Difference]:
        """Task vectors as differences of matrices (m, n), of the types in which they are stored; the base is one object."""
        shape, terms = matrix_shape(self.infos[name].shape), []
        base = self.read_base(name).to(device).reshape(shape)
        for task in tasks:
            factors = self._factors(name, task)
            if factors is not None:
                terms.append((factors.to(device).dense(), None))
            else:
                tuned = self.read_tuned(name, task).to(device)
                terms.append((tuned.reshape(shape), base))
        return terms

    def together(self, name: str) -> list[list[str]]:
        """Tasks whose checkpoints of a tensor are worked on side by side."""
        return [[task] for task in self.tasks] if self.large(name) else [self.tasks]

    def large(self, name: str) -> bool:
        """Whether one task vector of the tensor alone takes so much memory that only one is worked on at a time."""
        return 4 * self.infos[name].numel > STACK_BYTES // 2 and not self.factored(name)

    def ranks(self, name: str) -> list[int | None]:
        """Per task, of the factors that a task vector is given as; None where it is the difference of two tensors."""
        return [
            source.rank(name) if isinstance(source, AdapterSource) else None
            for source in map(self._sources.get, self.tasks)
        ]

    def factored(self, name: str) -> bool:
        """Whether no task changes the tensor but by an adapter's factors."""
        return None not in self.ranks(name)

    def joint_rank(self, name: str) -> int:
        """The largest rank that a sum of task vectors can have."""
        full, ranks = min(matrix_shape(self.infos[name].shape)), self.ranks(name)
        return full if None in ranks else min(sum(ranks), full)

    def _factors(self, name: str, task: str) -> LowRankFactors | None:
        """A task vector that is given as factors, as a matrix; None where it is the difference of two tensors."""
        source = self._sources[task]
        rank = source.rank(name) if isinstance(source, AdapterSource) else None
        if rank == 0:
            m, n = matrix_shape(self.infos[name].shape)
            return LowRankFactors.zeros(m, n, like=torch.empty(0))
        return None if rank is None else source.factors(name)

    def _read_one(self, name: str, task: str, device) -> Tensor | LowRankFactors:
        """A task vector, of the tensor's shape, or as factors of the matrix."""
        factors = self._factors(name, task)
        if factors is not None:
            return factors.to(device)
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
        """(T,) squared norms, not finite where something that is read is not; no task vector is formed."""
        energies = {}
        for task, rank in zip(self.tasks, self.ranks(name)):
            if rank is not None:
                energies[task] = energy_of(self._factors(name, task).to(device))
        for tasks in self.together(name):
            others = [task for task in tasks if task not in energies]
            if others:
                terms = self.terms(name, others, device)
                energies.update(zip(others, squared_norms(terms)))
        found = torch.stack([energies[task] for task in self.tasks]).cpu()
        if self.factored(name) and bool(found.any()):
            # no difference was taken to the base model
            found += 0 * energy_of(self.read_base(name).to(device)).cpu()
        return found

    def _non_finite(self, name: str) -> list[str]:
        if not bool(self.read_base(name).float().isfinite().all()):
            return [f"the base model {self.base.label}: {name}"]
        faults = []
        for task in self.tasks:
            factors = self._factors(name, task)
            if factors is None:
                read, where = [self.read_tuned(name, task)], ""
            else:
                read, where = [factors.up, factors.down], " of lora_A and lora_B"
            bad = sum(int((~part.float().isfinite()).sum()) for part in read)
            if bad:
                faults.append(f"{task}: {name} ({bad} entries{where})")
        return faults or [f"{name}: differences to the base model overflow float32"]


@dataclass(frozen=True)
class _OneByOne(Sequence):
    """Task vectors of one tensor, read when they are asked for."""

    task_vectors: TaskVectors
    name: str
    device: torch.device
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.task_vectors.tasks)

    def __getitem__(self, index: int) -> Matrix:
        task = self.task_vectors.tasks[index]
        tau = self.task_vectors._read_one(self.name, task, self.device)
        return tau if isinstance(tau, LowRankFactors) else tau.view(self.shape)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor viewed as out x everything else; vectors are 1 x n."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
