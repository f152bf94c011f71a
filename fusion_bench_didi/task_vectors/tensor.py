"""One tensor of a base model and its T fine-tuned models, read when it is asked for.

A task vector comes in the shape that a stage works on: as *differences*, which are never formed whole; as *matrices* in
float32, those of adapters as factors; or stacked in the tensor's own shape. Letters: ``m`` out, ``n`` in, ``T`` tasks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..lowrank.factors import LowRankFactors, Matrix
from ..lowrank.row_blocks import Difference, wide
from .sources import TensorInfo, TensorSource

#: Task vectors of one tensor are stacked in memory up to this size.
STACK_BYTES = 2**28


class ChangedTensor:
    """One tensor as the base model and the tasks have it.

    What is read for differences is kept for the next question unless it is large; drop the object with the tensor.

    Args:
        base: source of the base model.
        tuned: per task (T,).
        dtype: in which the fine-tuned checkpoints store it.
        device: where it is worked on.
    """

    def __init__(
        self,
        name: str,
        info: TensorInfo,
        base: TensorSource,
        tuned: Sequence[TensorSource],
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.name, self.shape, self.numel = name, info.shape, info.numel
        self.dtype, self.device = dtype, torch.device(device)
        self.ranks = [source.rank(name) for source in tuned]
        self._base, self._tuned = base, tuned
        self._kept: dict[int | None, Tensor] = {}

    @property
    def sides(self) -> tuple[int, int]:
        return merged_sides(self.shape)

    @property
    def factored(self) -> bool:
        """Whether no task changes it but by an adapter's factors."""
        return None not in self.ranks

    @property
    def adapters(self) -> list[int]:
        """Tasks that change it by an adapter's factors."""
        return [task for task, rank in enumerate(self.ranks) if rank is not None]

    @property
    def adapter_rank(self) -> int:
        """The largest rank of these; 0 if there are none."""
        return min(max((rank or 0 for rank in self.ranks), default=0), *self.sides)

    @property
    def large(self) -> bool:
        """Whether one task vector alone takes so much memory that only one is worked on at a time."""
        return 4 * self.numel > STACK_BYTES // 2 and not self.factored

    @property
    def stackable(self) -> bool:
        """Whether all task vectors fit into memory side by side."""
        return 4 * len(self._tuned) * self.numel <= STACK_BYTES or self.factored

    @property
    def together(self) -> list[list[int]]:
        """Tasks that are worked on side by side."""
        tasks = list(range(len(self._tuned)))
        return [[task] for task in tasks] if self.large else [tasks]

    def base(self) -> Tensor:
        """The base model's value, in its own type."""
        if self.large:
            return self._base.read(self.name)
        if None not in self._kept:
            self._kept[None] = self._base.read(self.name)
        return self._kept[None]

    def tuned(self, task: int) -> Tensor:
        """A task's value, in its own type."""
        if task in self._kept:
            return self._kept[task]
        source = self._tuned[task]
        if source.rank(self.name) is None:
            return source.read(self.name)
        return source.applied(self.name, self.base())

    def factors(self, task: int) -> LowRankFactors | None:
        """A task vector that is given as factors, as a matrix; None where it is the difference of two tensors."""
        rank = self.ranks[task]
        if rank == 0:
            return LowRankFactors.zeros(*self.sides, like=torch.empty(0))
        factors = None if rank is None else self._tuned[task].factors(self.name)
        turned = factors is not None and tuple(factors.shape) != self.sides
        return factors.mT if turned else factors

    def differences(self, tasks: Sequence[int] | None = None) -> list[Difference]:
        """Task vectors as differences of matrices (m, n), of the types in which they are stored; the base is one object.

        Args:
            tasks: positions; all if None.
        """
        tasks = range(len(self._tuned)) if tasks is None else tasks
        base = self.base().to(self.device).reshape(self.sides)
        found: list[Difference] = []
        for task in tasks:
            factors = self.factors(task)
            if factors is not None:
                found.append((factors.to(self.device).dense(), None))
                continue
            tuned = self.tuned(task)
            if not self.large:
                self._kept[task] = tuned
            found.append((tuned.to(self.device).reshape(self.sides), base))
        return found

    def matrices(self) -> Sequence[Matrix]:
        """The T task vectors as float32 matrices (m, n).

        Those of adapters are factors. Those of whole checkpoints are stacked, or read one at a time where they are large.
        """
        if not self.stackable:
            return _OneByOne(self)
        if any(rank is not None for rank in self.ranks):
            return list(_OneByOne(self))
        return self.stacked().view(-1, *self.sides)

    def stacked(self) -> Tensor:
        """All task vectors in float32, (T, *shape)."""
        base = wide(self.base().to(self.device))
        shape = len(self._tuned), *base.shape
        stack = base.new_empty(shape, dtype=torch.float32)
        for task, tau in enumerate(stack):
            factors = self.factors(task)
            if factors is None:
                torch.sub(self.tuned(task).to(self.device), base, out=tau)
            else:
                tau.copy_(factors.to(self.device).dense().view(tau.shape))
        return stack

    def matrix(self, task: int) -> Matrix:
        """One task vector as a float32 matrix, or as factors."""
        factors = self.factors(task)
        if factors is not None:
            return factors.to(self.device)
        tuned, base = self.tuned(task).to(self.device), self.base().to(self.device)
        if torch.float64 in (tuned.dtype, base.dtype):
            return (wide(tuned) - wide(base)).float().view(self.sides)
        tuned = tuned.to(torch.float32, copy=True)
        return tuned.sub_(base).view(self.sides)


class _OneByOne(Sequence):
    """Task vectors of one tensor, read when they are asked for."""

    def __init__(self, tensor: ChangedTensor):
        self._tensor = tensor

    def __len__(self) -> int:
        return len(self._tensor.ranks)

    def __getitem__(self, task: int) -> Matrix:
        if not 0 <= task < len(self):
            raise IndexError(task)
        return self._tensor.matrix(task)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor viewed as out x everything else; vectors are 1 x n."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def merged_sides(shape: Sequence[int]) -> tuple[int, int]:
    """:func:`matrix_shape`, with a single column as the vector that it is, of one scale instead of one per entry."""
    m, n = matrix_shape(shape)
    return (1, m) if n == 1 else (m, n)
