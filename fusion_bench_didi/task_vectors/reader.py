"""Task vectors of a pool: a base model and its T fine-tuned models, aligned and checked, read one tensor at a time.

A *source* (``sources.py``) gives tensors by the names of the base model's parameters. ``TaskVectors`` lines T sources up with the
base, finds every fault from shapes and dtypes alone, and sorts the tensors into classes (adapters, ``lora_adapter.py``, are
sources of what they change, as factors where they can):

- ``matrices``: two sides of at least 2 (a convolution is viewed as out x (in * kh * kw));
- ``vectors``: everything else that some task changed (biases, norms, class embeddings);
- ``untouched``: what no task changed; costs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ModelPoolError
from .alignment import check_alignment, floating, matches
from .sources import TensorInfo, TensorSource, aligned
from .tensor import ChangedTensor, matrix_shape


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
            task: s if s.partial else aligned(s, reference)
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

    def tensor(self, name: str, device: torch.device | str = "cpu") -> ChangedTensor:
        """One tensor of all models, read when it is asked for."""
        sources = [self._sources[task] for task in self.tasks]
        dtype, info = self.tuned_dtype(name), self.infos[name]
        return ChangedTensor(name, info, self.base, sources, dtype, device)

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
