"""Tensors of the backbone as each task sees them, in the data type and on the device they are run in.

A :class:`ValueBank` holds a vector, or any small tensor, whole for every task. A :class:`MatrixBank` holds what a product
needs, ``x W_t`` with ``W_t`` (n, m): a task's factors, or its matrix where that holds fewer values or is faster. Letters:
``n`` in, ``m`` out, ``r`` rank, ``T`` tasks; task number T is the shared model without an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..errors import DiDiError
from ..lowrank.arithmetic import without_autocast
from ..options import Gigabytes, check_fields

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Serving:
    """How mixed batches trade memory for time.

    Args:
        dense_above: factors that hold more than this part of their matrix's values are multiplied out. 0 gives a matrix
            per task, hence the arithmetic of the plain model.
        small: so are those of matrices of fewer values, whose thin products take longer than their arithmetic.
        memory_limit_gb: None keeps everything in the type it is multiplied in, up to T times the backbone's memory. Else
            the model is the backbone and what is stored, each product decodes what it needs, and so many GB of that are
            held for the next batch, of tasks that are asked for often; 0 holds nothing. Factors are then used wherever
            they take less time than their matrix, but for ``dense_above=0``. Graphs of ``torch.compile`` break there.

    Raises:
        SettingsError: for limits below zero.
    """

    dense_above: Annotated[float, Field(ge=0)] = 0.25
    small: Annotated[int, Field(ge=0)] = 2**18
    memory_limit_gb: Gigabytes | None = None

    def __post_init__(self):
        check_fields(self)


class Bank:
    """One tensor of the backbone under every task.

    Args:
        tasks: T.
    """

    def __init__(self, tasks: int):
        self.tasks = tasks

    def value(self, task: int) -> Tensor:
        """The tensor under one task, in the backbone's shape."""
        raise NotImplementedError

    def mixed(self, weights: Tensor) -> Tensor:
        """``shared + sum_t w_t (value_t - shared)``, shared the shared model's, for one row of weights (T,); of a one-hot row the task's, exactly."""
        active = weights.nonzero().squeeze(1).tolist()
        if len(active) == 1 and weights[active[0]] == 1:
            return self.value(active[0])
        value = shared = self.value(self.tasks)
        for task in active:
            value = value + weights[task].to(shared) * (self.value(task) - shared)
        return value


class ValueBank(Bank):
    """A bank that holds every task's tensor whole.

    Args:
        values: (T + 1, *shape); the last one is the shared model's.
    """

    def __init__(self, values: Tensor):
        super().__init__(len(values) - 1)
        self.values = values

    def value(self, task: int) -> Tensor:
        return self.values[task]


class OwnBank(Bank):
    """Tensors that no sample can be given by slices of one: of a shape per task, or of an integer type.

    Args:
        name: of the tensor.
        values: per task, and the shared model's (T + 1,).
        tasks: their names.

    Attributes:
        shapes_differ: the values are of several shapes.
    """

    def __init__(self, name: str, values: Sequence[Tensor], tasks: Sequence[str]):
        super().__init__(len(values) - 1)
        self.name, self.values, self.names = name, list(values), list(tasks)
        self.shapes_differ = len({value.shape for value in values}) > 1

    def value(self, task: int) -> Tensor:
        return self.values[task]

    def mixed(self, weights: Tensor) -> Tensor:
        """Counters are those of the task with the largest weight.

        Raises:
            DiDiError: if tensors of several shapes are to be mixed.
        """
        active = weights.nonzero().squeeze(1).tolist()
        found = [self.values[task] for task in active] or self.values[-1:]
        if len(found) == 1:
            return found[0]
        if not found[0].is_floating_point():
            return self.values[int(weights.argmax())]
        if any(value.shape != found[0].shape for value in found):
            shapes = {self.names[t]: tuple(self.values[t].shape) for t in active}
            raise DiDiError(
                f"{self.name} has no weighted mean over these tasks, for which it is of several shapes: {shapes}. Give each "
                "sample one task."
            )
        if found[0].shape == self.values[-1].shape:
            return super().mixed(weights)
        share = weights[active] / weights[active].sum()  # none is the base model's
        return sum(part.to(value) * value for part, value in zip(share, found))


class MatrixBank(Bank):
    """``x W_t = x S + (x A_t) B_t``, or ``x D_t`` where the task's matrix is kept.

    Args:
        shape: of the backbone's tensor.
        shared: S (n, m), the shared model's.
        tasks: per task the factors (n, r) and (r, m), the matrix (n, m), or None for ``shared``.
        turned: the backbone holds the transpose, (m, n).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        shared: Tensor,
        tasks: Sequence[Factors | Tensor | None],
        *,
        turned: bool,
    ):
        super().__init__(len(tasks))
        self.shape, self.shared, self.turned = shape, shared, turned
        n, m = shared.shape
        nothing = (shared.new_zeros(n, 0), shared.new_zeros(0, m))
        kept = [*tasks, None]
        factors = [k if isinstance(k, tuple) else nothing for k in kept]
        self.dense = [
            t for t, k in enumerate(kept) if not isinstance(k, (tuple, NoneType))
        ]
        self.matrices = [k if t in self.dense else shared for t, k in enumerate(kept)]
        self.ranks = ranks = [first.shape[1] for first, _ in factors]
        first = torch.cat([first for first, _ in factors], 1)
        last = torch.cat([last for _, last in factors])
        self.first = laid_out(first, turned)  # (n, R)
        self.last = laid_out(last, turned)  # (R, m)
        self.firsts, self.lasts = self.first.split(ranks, 1), self.last.split(ranks)
        tasks_of = torch.tensor(ranks, device="cpu")
        owner = torch.arange(len(ranks), device="cpu").repeat_interleave(tasks_of)
        self.owner = owner.to(shared.device)  # (R,) the task of each direction
        self._stack: Tensor | None = None

    @without_autocast()
    def value(self, task: int) -> Tensor:
        matrix = self.matrices[task]
        if self.lasts[task].shape[0]:
            matrix = matrix + self.firsts[task] @ self.lasts[task]
        return (matrix.mT if self.turned else matrix).reshape(self.shape)

    @without_autocast()
    def stacked(self) -> Tensor:
        """All matrices as one tensor (T + 1, n, m), which from now on is what the bank holds."""
        if self._stack is None:
            parts = zip(self.matrices, self.firsts, self.lasts)
            whole = torch.stack([matrix + f @ b for matrix, f, b in parts])
            self.__init__(self.shape, whole[-1], list(whole[:-1]), turned=self.turned)
            self._stack = whole
        return self._stack

    def transposed(self) -> "MatrixBank":
        """The bank laid out for a module that multiplies by the transpose; holds no matrix of its own."""
        parts = []
        for task in range(self.tasks):
            if task in self.dense:
                parts.append(self.matrices[task].mT)
            elif self.lasts[task].shape[0]:
                parts.append((self.lasts[task].mT, self.firsts[task].mT))
            else:
                parts.append(None)
        return MatrixBank(self.shape, self.shared.mT, parts, turned=not self.turned)

    @property
    def held(self) -> bool:
        """Every task has a matrix of its own."""
        return len(self.dense) == self.tasks


def laid_out(matrix: Tensor, turned: bool) -> Tensor:
    """A matrix (n, m) as it is multiplied by fastest: in 16 bits by columns, as linear layers have it, else by rows.

    Args:
        turned: it is of a linear layer; one whose rows are looked up lies by rows.
    """
    by_columns = turned and matrix.dtype.itemsize == 2
    return matrix.mT.contiguous().mT if by_columns else matrix.contiguous()


def side_by_side(banks: Sequence[MatrixBank]) -> MatrixBank:
    """All columns of banks that are :attr:`~MatrixBank.held`, which from now on hold parts of it."""
    every = zip(*(b.matrices for b in banks))
    wide = [laid_out(torch.cat(matrices, 1), turned=True) for matrices in every]
    parts = [matrix.split([b.shared.shape[1] for b in banks], 1) for matrix in wide]
    for bank, own in zip(banks, zip(*parts)):
        bank.__init__(bank.shape, own[-1], own[:-1], turned=bank.turned)
    n, m = wide[-1].shape
    return MatrixBank((m, n), wide[-1], wide[:-1], turned=True)
