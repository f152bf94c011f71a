"""What a batch is mixed by: a task per sample, or weights over the tasks per sample.

Both offer the same operations on banks, per sample: :meth:`rows` of a small tensor, a :meth:`product` with a matrix, and
a :meth:`lookup` of rows of a matrix; and the :meth:`value` of a bank where all samples see one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor
from torch.nn import functional as F

from .banks import Bank, MatrixBank, ValueBank
from .grouped_matmul import product_by_task
from .outputs import rows_of_samples
from .stored import Inputs, StoredBank, Vectors

#: values of the matrices that are mixed at a time
BLOCK = 2**22


class _Batch:
    """What both have.

    Attributes:
        order: (B,) where the samples are in the batch as given.
        uniform: all are of equal weights over several tasks.
    """

    order: Tensor
    uniform = False

    @property
    def size(self) -> int:
        return len(self.order)

    @property
    def in_order(self) -> bool:
        """Whether the samples are in the order in which they were given."""
        return bool((self.order[1:] > self.order[:-1]).all())

    def product(
        self, x: Tensor, bank: MatrixBank | StoredBank, bias: ValueBank | None
    ) -> Tensor:
        """``x_i W_i + b_i`` for x (B, ..., n), cast as a plain layer would; (B, ..., m)."""
        dtype = product_dtype(x.device)
        if dtype is not None and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(dtype)
        if not isinstance(bank, StoredBank):
            return self.of_matrices(x, bank, bias)
        y = self.stored(Vectors(x, bank.turned), bank)
        return y if bias is None else y.add_(over(self.rows(bias), y))


def product_dtype(device: torch.device) -> torch.dtype | None:
    """Type that ``torch.autocast`` casts products on a device to, or None where it does not; what is multiplied into a given
    tensor it leaves as it is."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@dataclass
class ByTask(_Batch):
    """One task per sample; the batch is sorted so that equal tasks lie side by side.

    Args:
        tasks: (B,) sorted; T stands for the shared model.
        counts: (T + 1,) samples per task, on the CPU.
        order: (B,) where the samples are in the batch as given.
    """

    tasks: Tensor
    counts: Tensor
    order: Tensor

    @classmethod
    def of(cls, task_ids: Tensor, count: int) -> "ByTask":
        """Sorts the batch.

        Args:
            task_ids: (B,) in 0 ... T.
            count: T.
        """
        tasks, order = task_ids.sort(stable=True)
        numbers = torch.arange(count + 1, device=tasks.device)
        counts = (tasks[:, None] == numbers).sum(0).cpu()
        return cls(tasks, counts, order)

    def like_first(self, count: int) -> "ByTask":
        """A mix of so many samples of the first one's task."""
        tasks = self.tasks[:1].expand(count)
        return ByTask.of(tasks, len(self.counts) - 1)

    def repeated(self, times: int) -> "ByTask":
        """A mix of so many rows for every sample, side by side."""
        order = rows_of_samples(self.order, times)
        return ByTask(self.tasks.repeat_interleave(times), self.counts * times, order)

    def named(self, tasks: Sequence[str]) -> str:
        """The tasks of the samples."""
        names = [*map(repr, tasks), "the shared model"]
        return ", ".join(n for n, count in zip(names, self.counts.tolist()) if count)

    def groups(self) -> Iterator["ByTask"]:
        """The samples of one task each."""
        start = 0
        for task, count in enumerate(self.counts.tolist()):
            if count:
                counts = torch.zeros_like(self.counts)
                counts[task] = count
                part = slice(start, start + count)
                yield ByTask(self.tasks[part], counts, self.order[part])
            start += count

    def pieces(self, limit: int) -> list["ByTask"]:
        """Batches of at most ``limit`` samples, or of one task."""
        pieces: list[ByTask] = []
        for group in self.groups():
            if pieces and pieces[-1].size + group.size <= limit:
                pieces[-1] = pieces[-1] + group
            else:
                pieces.append(group)
        return pieces

    def __add__(self, other: "ByTask") -> "ByTask":
        both = zip((self.tasks, self.order), (other.tasks, other.order))
        tasks, order = (torch.cat(pair) for pair in both)
        return ByTask(tasks, self.counts + other.counts, order)

    @property
    def asked(self) -> list[int]:
        """The tasks that some sample is of."""
        return [task for task, count in enumerate(self.counts.tolist()) if count]

    def value(self, bank: Bank) -> Tensor:
        """A tensor as the first sample sees it."""
        return bank.value(int(self.tasks[0]))

    def rows(self, bank: ValueBank) -> Tensor:
        """The tensor of each sample, (B, *shape)."""
        return bank.values.index_select(0, self.tasks)

    def scale(self, owner: Tensor) -> Tensor:
        """(B, R) weights of directions that belong to the tasks ``owner`` (R,)."""
        return self.tasks[:, None] == owner

    def of_matrices(
        self, x: Tensor, bank: MatrixBank, bias: ValueBank | None
    ) -> Tensor:
        """The :meth:`product` with matrices or factors that are at hand."""
        biases = None if bias is None else bias.values
        return product_by_task(x, self.tasks, self.counts, biases, bank)

    def stored(self, inputs: Inputs, bank: StoredBank) -> Tensor:
        """The product with each sample's own matrix, or rows of it."""
        return bank.by_task(inputs, self.counts.tolist())

    def lookup(self, positions: Tensor, values: Tensor) -> Tensor:
        """Rows ``positions`` (B, ...) of each sample's own matrix, out of (T + 1, n, m)."""
        shift = self.tasks.view(-1, *(1,) * (positions.ndim - 1)) * values.shape[1]
        return F.embedding(positions + shift, values.flatten(0, 1))


@dataclass
class ByWeight(_Batch):
    """Weights over the tasks per sample.

    Args:
        weights: (B, T).
        order: (B,) where the samples are in the batch as given.
        uniform: all rows are equal.
    """

    weights: Tensor
    order: Tensor
    uniform: bool = False

    @classmethod
    def of(cls, weights: Tensor) -> "ByWeight":
        order = torch.arange(len(weights), device=weights.device)
        uniform = bool((weights == weights[0]).all())
        return cls(weights, order, uniform)

    def like_first(self, count: int) -> "ByWeight":
        return ByWeight.of(self.weights[:1].expand(count, -1))

    def repeated(self, times: int) -> "ByWeight":
        order = rows_of_samples(self.order, times)
        return ByWeight(self.weights.repeat_interleave(times, 0), order, self.uniform)

    def named(self, tasks: Sequence[str]) -> str:
        row = [f"{weight:.3g} {task!r}" for task, weight in zip(tasks, self.weights[0])]
        return f"weights such as {' + '.join(row)}"

    @property
    def asked(self) -> list[int]:
        return self.weights.any(0).nonzero().flatten().tolist()

    def value(self, bank: Bank) -> Tensor:
        return bank.mixed(self.weights[0])

    def groups(self) -> Iterator["ByWeight"]:
        """The samples of equal weights each."""
        _, which = self.weights.unique(dim=0, return_inverse=True)
        for group in range(int(which.max()) + 1):
            index = (which == group).nonzero().squeeze(1)
            yield ByWeight(self.weights[index], self.order[index], True)

    def pieces(self, limit: int) -> list["ByWeight"]:
        return [self]

    def scale(self, owner: Tensor) -> Tensor:
        return self.weights[:, owner]

    def rows(self, bank: ValueBank) -> Tensor:
        shared = bank.values[-1]
        changes = bank.values[:-1] - shared
        return shared + torch.tensordot(self.weights.to(shared), changes, 1)

    def of_matrices(
        self, x: Tensor, bank: MatrixBank, bias: ValueBank | None
    ) -> Tensor:
        weights = self.weights.to(x)
        if bank.dense:
            own = weights[:, bank.dense]
            weights_of = torch.cat([own, 1 - own.sum(1, keepdim=True)], 1)
            matrices = [*(bank.matrices[task] for task in bank.dense), bank.shared]
            y = _mixed_product(x, weights_of, matrices)
        else:
            y = x @ bank.shared
        if len(bank.owner):
            scale = over(weights[:, bank.owner], x)
            y = y + ((x @ bank.first) * scale) @ bank.last
        return y if bias is None else y + over(self.rows(bias), y).to(y)

    def stored(self, inputs: Inputs, bank: StoredBank) -> Tensor:
        return bank.by_weight(inputs, self.weights)

    def lookup(self, positions: Tensor, values: Tensor) -> Tensor:
        y = shared = F.embedding(positions, values[-1])
        for task in range(len(values) - 1):
            scale = over(self.weights[:, task : task + 1].to(values), shared)
            y = y + scale * (F.embedding(positions, values[task]) - shared)
        return y


def _mixed_product(x: Tensor, weights: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``x_i (sum_d w_id M_d)``: a matrix per sample costs less than a product per task where samples have many rows.

    Args:
        x: (B, ..., n).
        weights: (B, D).
        matrices: D of (n, m).
    """
    n, m = matrices[0].shape
    flat = torch.stack([*matrices]).flatten(1)  # (D, n m)
    step = max(1, BLOCK // flat.shape[1])
    rows = x.reshape(len(x), -1, n)
    parts = zip(rows.split(step), weights.split(step))
    y = torch.cat([part @ (row @ flat).view(-1, n, m) for part, row in parts])
    return y.view(*x.shape[:-1], m)


Mix = Union[ByTask, ByWeight]


@torch.compiler.disable
def mix_of(weights: Tensor) -> Mix:
    """By task where every row is one-hot or zero, else by weight.

    Args:
        weights: (B, T).
    """
    largest, tasks = weights.max(1)
    count = weights.shape[1]
    alone = (weights != 0).sum(1) == (largest != 0)
    if bool((alone & ((largest == 1) | (largest == 0))).all()):
        return ByTask.of(torch.where(largest == 1, tasks, count), count)
    return ByWeight.of(weights)


def over(rows: Tensor, like: Tensor) -> Tensor:
    """(B, *s) laid out to broadcast over (B, ..., *s)."""
    between = (1,) * (like.ndim - rows.ndim)
    return rows.view(len(rows), *between, *rows.shape[1:])
