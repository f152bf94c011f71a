"""Tensors of the backbone as each task sees them, in the data type and on the device they are run in.

A :class:`ValueBank` holds a vector, or any small tensor, whole for every task. A :class:`MatrixBank` holds what a product
needs, ``x W_t`` with ``W_t`` (n, m): a task's factors, or its matrix where that holds fewer values or is faster. Letters:
``n`` in, ``m`` out, ``r`` rank, ``T`` tasks; task number T is the shared model without an expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Union

import torch
from torch import Tensor

from ..deltas.base import Delta
from ..deltas.plain import LowRankDelta, SpectralDelta
from ..deltas.quantized import RoundedLowRankDelta
from ..deltas.tucker import Core

Factors = tuple[Tensor, Tensor]
Matrix = Union[Tensor, Callable[[], Tensor]]


@dataclass(frozen=True)
class Serving:
    """How mixed batches trade memory for time.

    Args:
        dense_above: factors that hold more than this part of their matrix's values are multiplied out. 0 gives a matrix
            per task, hence the arithmetic of the plain model.
        small: so are those of matrices of fewer values, whose thin products take longer than their arithmetic.
        hold: keep such matrices, and those that are stored whole in few bits, in the type they are multiplied in: up to
            T times the backbone's memory. False: make each one anew whenever it is used. Not for ``torch.compile``.
    """

    dense_above: float = 0.25
    small: int = 2**18
    hold: bool = True


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
        """``common + sum_t w_t (value_t - common)`` for one row of weights (T,); of a one-hot row the task's, exactly."""
        active = weights.nonzero().squeeze(1).tolist()
        if len(active) == 1 and weights[active[0]] == 1:
            return self.value(active[0])
        value = common = self.value(self.tasks)
        for task in active:
            value = value + weights[task].to(common) * (self.value(task) - common)
        return value


class ValueBank(Bank):
    """Every task's tensor, whole.

    Args:
        values: (T + 1, *shape); the last one is the shared model's.
    """

    def __init__(self, values: Tensor):
        super().__init__(len(values) - 1)
        self.values = values

    def value(self, task: int) -> Tensor:
        return self.values[task]


class MatrixBank(Bank):
    """``x W_t = x C + (x A_t) B_t``, or ``x D_t`` where the task's matrix is kept.

    Args:
        shape: of the backbone's tensor.
        common: (n, m) base plus shared change.
        tasks: per task the factors (n, r) and (r, m), the matrix (n, m) or a function that makes it, or None for
            ``common``.
        turned: the backbone holds the transpose, (m, n).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        common: Tensor,
        tasks: Sequence[Factors | Matrix | None],
        *,
        turned: bool,
    ):
        super().__init__(len(tasks))
        self.shape, self.common, self.turned = shape, common, turned
        n, m = common.shape
        nothing = (common.new_zeros(n, 0), common.new_zeros(0, m))
        kept = [*tasks, None]
        factors = [k if isinstance(k, tuple) else nothing for k in kept]
        self.dense = [
            t for t, k in enumerate(kept) if not isinstance(k, (tuple, NoneType))
        ]
        matrices = [k if t in self.dense else common for t, k in enumerate(kept)]
        made = any(callable(k) for k in matrices)
        self.matrices = Matrices(matrices) if made else matrices
        ranks = [first.shape[1] for first, _ in factors]
        self.first = torch.cat([first for first, _ in factors], 1)  # (n, R)
        self.last = torch.cat([last for _, last in factors])  # (R, m)
        self.firsts, self.lasts = self.first.split(ranks, 1), self.last.split(ranks)
        owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
        self.owner = owner.to(common.device)  # (R,) the task of each direction

    def value(self, task: int) -> Tensor:
        matrix = self.matrices[task]
        if self.lasts[task].shape[0]:
            matrix = matrix + self.firsts[task] @ self.lasts[task]
        return (matrix.mT if self.turned else matrix).reshape(self.shape)

    def stacked(self) -> Tensor:
        """All matrices as one tensor (T + 1, n, m), which from now on is what the table holds."""
        whole = torch.stack([m + f @ b for m, f, b in self._parts()])
        self.__init__(self.shape, whole[-1], list(whole[:-1]), turned=self.turned)
        return whole

    @property
    def held(self) -> bool:
        """Every task has a matrix of its own, at hand."""
        return len(self.dense) == self.tasks and isinstance(self.matrices, list)

    def _parts(self):
        return zip(self.matrices, self.firsts, self.lasts)


class Matrices(Sequence):
    """Matrices of which some are made whenever they are asked for."""

    def __init__(self, kept: Sequence[Matrix]):
        self.kept = kept

    def __getitem__(self, task: int) -> Tensor:
        matrix = self.kept[task]
        return matrix() if callable(matrix) else matrix

    def __len__(self) -> int:
        return len(self.kept)


def side_by_side(tables: Sequence[MatrixBank]) -> MatrixBank:
    """All columns of tables that are :attr:`~MatrixBank.held`, which from now on hold parts of it."""
    wide = [torch.cat(matrices, 1) for matrices in zip(*(t.matrices for t in tables))]
    parts = [matrix.split([t.common.shape[1] for t in tables], 1) for matrix in wide]
    for table, own in zip(tables, zip(*parts)):
        table.__init__(table.shape, own[-1], own[:-1], turned=table.turned)
    n, m = wide[-1].shape
    return MatrixBank((m, n), wide[-1], wide[:-1], turned=True)


AnyBank = Union[ValueBank, MatrixBank]


@torch.no_grad()
def bank_of(
    base: Tensor,
    shared: Delta | None,
    deltas: Sequence[Delta | None],
    *,
    shared_scale: float = 1.0,
    turned: bool | None = None,
    serving: Serving = Serving(),
) -> AnyBank:
    """The table of one tensor, in its data type and on its device, computed in float32.

    Args:
        shared: the change that all tasks share, counted ``shared_scale`` times for the shared model.
        deltas: per task.
        turned: for a matrix, whether (m, n) is what the backbone holds; None for a table of values.
    """
    whole = None if shared is None else shared.change()
    common = base.float() if whole is None else base.float() + shared_scale * whole

    def own(delta: Delta) -> Tensor:
        """What a task adds to ``common``."""
        change = delta.change(shared)
        return change if shared is None else change - shared.change()

    if turned is None:
        values = [common if delta is None else common + own(delta) for delta in deltas]
        return ValueBank(torch.stack([*values, common]).to(base.dtype))

    def laid_out(matrix: Tensor) -> Tensor:
        matrix = matrix.flatten(1)
        matrix = (matrix.mT if turned else matrix).to(base.dtype).contiguous()
        return matrix.clone() if matrix.data_ptr() == base.data_ptr() else matrix

    start = laid_out(common)

    def kept(delta: Delta | None) -> Factors | Matrix | None:
        factors = None if delta is None else factors_of(delta, shared)
        if factors is not None and delta.numel >= serving.small:
            size = sum(factor.numel() for factor in factors)
            if size <= serving.dense_above * delta.numel:
                up, down = factors
                pair = (down.mT, up.mT) if turned else (up, down)
                return tuple(factor.to(base.dtype) for factor in pair)
        if delta is None:
            return None
        if serving.hold:
            return laid_out(common + own(delta))
        return lambda: start + laid_out(own(delta))

    tasks = [kept(delta) for delta in deltas]
    return MatrixBank(tuple(base.shape), start, tasks, turned=turned)


def factors_of(delta: Delta, shared: Delta | None) -> Factors | None:
    """(up, down) in float32 of a change that is stored as a product, ``shared + up @ down``."""
    if isinstance(delta, Core):
        return shared.factors(delta.core())
    if isinstance(delta, RoundedLowRankDelta):
        return delta.factors()
    if isinstance(delta, SpectralDelta):
        return delta.up.float() * delta.sigma.float(), delta.down.float()
    if isinstance(delta, LowRankDelta):
        return delta.up.float(), delta.down.float()
    return None
