"""Matrices of the backbone under every task, out of what is stored: decoded into each product and dropped again.

What is in memory is the backbone, the deltas as they are written to the file, and what one product needs: the factors of
a task's change, or a block of rows of its matrix. :class:`~.held.Held` keeps some of it decoded for the next batch.
Letters: ``m`` and ``n`` the sides of the backbone's matrix as it lies, ``r`` rank, ``T`` tasks; task T is the shared model.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..deltas.base import Delta, row_blocks
from ..deltas.plain import OwnDelta
from ..lowrank.arithmetic import without_autocast
from .banks import Bank, Serving
from .held import Held

#: Forms in which a task's part of a matrix is held.
WHOLE, FACTORS = "whole", "factors"
#: How much more arithmetic factors may take than the matrix they make, which has to be laid out before it is multiplied.
LAID_OUT = 1.3
#: Two factors of a change, and what each direction between them is multiplied by.
Scaled = tuple[Tensor, Tensor | None, Tensor]
#: Rows of a matrix, and their values.
Blocks = Iterator[tuple[slice | Tensor, Tensor]]


def _scaled(inner: Tensor, scale: Tensor | None) -> Tensor:
    return inner if scale is None else (inner * scale).to(inner.dtype)


def _flat(vectors: Tensor) -> Tensor:
    """(rows, n) of (..., n)."""
    return vectors.reshape(-1, vectors.shape[-1])


def _flat_view(out: Tensor) -> Tensor:
    """The same memory, never a copy that would be written to in vain."""
    return out.view(-1, out.shape[-1])


class Vectors:
    """Inputs of a layer: vectors that are multiplied by a matrix.

    Args:
        x: (B, ..., n), or (B, ..., m) for a matrix that is not turned.
        turned: multiply by the transpose, as linear layers do.
    """

    def __init__(self, x: Tensor, turned: bool):
        self.x, self.turned = x, turned

    def __getitem__(self, rows: slice) -> "Vectors":
        return Vectors(self.x[rows], self.turned)

    @property
    def rows(self) -> int:
        return self.x.shape[:-1].numel()

    def empty(self, shape: tuple[int, int]) -> Tensor:
        """For the result with a matrix of a shape."""
        return self.x.new_empty(*self.x.shape[:-1], shape[0 if self.turned else 1])

    def matrix(self, matrix: Tensor, out: Tensor) -> None:
        """Writes the product with a matrix."""
        matrix = matrix.to(self.x.dtype)  # no autocast where the result is given
        matrix = matrix.mT if self.turned else matrix
        torch.mm(_flat(self.x), matrix, out=_flat_view(out))

    def add_factors(self, factors: Scaled, out: Tensor) -> None:
        """Adds the product with a change; in place, since a result of its own takes as long to be laid out as to be worked out."""
        up, scale, down = factors
        first, last = (down.mT, up.mT) if self.turned else (up, down)
        inner = _scaled(_flat(self.x) @ first, scale)
        _flat_view(out).addmm_(inner, last.to(inner.dtype))

    def blocks(self, blocks: Blocks, out: Tensor) -> None:
        if not self.turned:
            out.zero_()
        for rows, values in blocks:
            values = values.to(self.x.dtype)
            if self.turned:
                out[..., rows] = self.x @ values.mT
            else:
                out += self.x[..., rows] @ values


class Positions:
    """Inputs of an embedding: rows of a matrix that are looked up.

    Args:
        ids: (B, ...).
        like: of the type of the result.
    """

    def __init__(self, ids: Tensor, like: Tensor):
        self.ids, self.like = ids, like

    def __getitem__(self, rows: slice) -> "Positions":
        return Positions(self.ids[rows], self.like)

    @property
    def rows(self) -> int:
        return self.ids.numel()

    def empty(self, shape: tuple[int, int]) -> Tensor:
        return self.like.new_empty(*self.ids.shape, shape[1])

    def matrix(self, matrix: Tensor, out: Tensor) -> None:
        out.copy_(F.embedding(self.ids, matrix))

    def add_factors(self, factors: Scaled, out: Tensor) -> None:
        up, scale, down = factors
        out += _scaled(F.embedding(self.ids, up), scale) @ down

    def blocks(self, blocks: Blocks, out: Tensor) -> None:
        for rows, values in blocks:
            if isinstance(rows, slice):
                here = (self.ids >= rows.start) & (self.ids < rows.stop)
                out[here] = values.to(out.dtype)[self.ids[here] - rows.start]
            else:
                rows, order = rows.to(self.ids.device).sort()
                place = torch.searchsorted(rows, self.ids.contiguous()).clamp(
                    max=len(rows) - 1
                )
                here = rows[place] == self.ids
                out[here] = values.to(out.dtype)[order[place[here]]]


Inputs = Vectors | Positions


class StoredBank(Bank):
    """A matrix under every task, of the base model's and of stored deltas.

    Args:
        name: of the tensor.
        base: gives the base model's tensor, wherever that is now.
        shared: the change that all tasks share, counted ``shared_scale`` times for the shared model.
        deltas: per task.
        turned: it is multiplied by as the transpose.
        serving: which changes are used as factors.
        held: shared by all banks of a model.
    """

    def __init__(
        self,
        name: str,
        base: Callable[[], Tensor],
        shared: Delta | None,
        deltas: Sequence[Delta | None],
        *,
        shared_scale: float,
        turned: bool,
        serving: Serving,
        held: Held,
    ):
        super().__init__(len(deltas))
        self.name, self.base, self.shared = name, base, shared
        self.deltas, self.scale, self.turned = list(deltas), shared_scale, turned
        self.serving, self.held = serving, held
        #: of changes that are products, None of others; found out at first use
        self.ranks: dict[int, int | None] = {}

    @property
    def sides(self) -> tuple[int, int]:
        base = self.base()
        return len(base), base[0].numel()

    @property
    def added(self) -> Delta | None:
        """The shared part, if that changes the matrix."""
        return self.shared if self.shared is not None and self.shared.adds else None

    def key(self, form: str) -> Hashable:
        """Key under which a form of this matrix is held."""
        return self.name, self.scale, form

    def transposed(self) -> "StoredBank":
        """The bank for a module that multiplies by the other side."""
        other = copy.copy(self)
        other.turned = not self.turned
        return other

    @without_autocast()
    def value(self, task: int) -> Tensor:
        return _Use(self).whole(task).view(self.base().shape)

    @torch.compiler.disable
    def by_task(self, inputs: Inputs, counts: Sequence[int]) -> Tensor:
        """(B, ..., m), a task per sample.

        Args:
            inputs: of B samples sorted by task.
            counts: (T + 1,) samples per task.
        """
        use, y, start = _Use(self), inputs.empty(self.sides), 0
        parts: list[tuple[int, slice, bool]] = []
        alike: list[slice] = []  # rows that the shared matrix is part of
        for task, count in enumerate(counts):
            rows, start = slice(start, start + count), start + count
            if not count:
                continue
            if not use.is_shared(task):
                factored = use.factored(task, inputs[rows])
                parts.append((task, rows, factored))
                if not factored:
                    continue
            if alike and alike[-1].stop == rows.start:
                alike[-1] = slice(alike[-1].start, rows.stop)
            else:
                alike.append(rows)
        for rows in alike:
            use.shared_product(inputs[rows], y[rows])
        for task, rows, factored in parts:  # of one task at a time
            if factored:
                inputs[rows].add_factors(use.factors(task), y[rows])
            else:
                use.product(inputs[rows], task, y[rows])
        return y

    @torch.compiler.disable
    def by_weight(self, inputs: Inputs, weights: Tensor) -> Tensor:
        """(B, ..., m), weights (B, T) over the tasks per sample."""
        use, shared = _Use(self), inputs.empty(self.sides)
        use.shared_product(inputs, shared)
        y = shared.clone()
        for task in weights.any(0).nonzero().flatten().tolist():
            if use.is_shared(task):
                continue
            if use.factored(task, inputs):
                inputs.add_factors(use.factors(task), own := torch.zeros_like(y))
            else:
                use.product(inputs, task, own := torch.empty_like(y))
                own -= shared
            scale = weights[:, task].to(y).view(-1, *(1,) * (y.ndim - 1))
            y.addcmul_(own, scale)
        return y


class _Use:
    """Matrices decoded for one product; nothing of it outlives that but what is held.

    Args:
        bank: of the matrix.
    """

    def __init__(self, bank: StoredBank):
        self.bank, self.base = bank, bank.base().flatten(1)
        self._start: Tensor | None = None
        self._decoded: Delta | None = None

    def is_shared(self, task: int) -> bool:
        """Whether a task adds nothing of its own."""
        bank = self.bank
        return task == bank.tasks or bank.deltas[task] is None

    def shared_rows(self, rows: slice | Tensor) -> Tensor:
        """``base + scale * shared`` in float32, not to be written to."""
        bank = self.bank
        if bank.added is None:
            return self.base[rows].float()
        if self._start is None:
            change = self._shared().change().view(self.base.shape)
            self._start = torch.add(self.base.float(), change, alpha=bank.scale)
        return self._start[rows]

    def of_task(self, task: int) -> Blocks:
        """A task's matrix in float32."""
        bank = self.bank
        if self.is_shared(task):
            for rows in row_blocks(*self.base.shape):
                yield rows, self.shared_rows(rows)
            return
        delta = bank.deltas[task]
        if isinstance(delta, OwnDelta):
            own = delta.applied(bank.base()).to(self.base.dtype)
            yield slice(0, len(own)), own.flatten(1)
            return
        for rows, values in delta.blocks(self._shared()):
            yield rows, values + self.shared_rows(rows)

    def whole(self, task: int) -> Tensor:
        """A task's matrix, or the shared one, in the backbone's type."""
        matrix = torch.empty_like(self.base)
        for rows, values in self.of_task(task):
            matrix[rows] = values.to(matrix.dtype)
        return matrix

    def shared_product(self, inputs: Inputs, out: Tensor) -> None:
        if self.bank.added is None:
            inputs.matrix(self.base, out)
        else:
            self.product(inputs, self.bank.tasks, out)

    def product(self, inputs: Inputs, task: int, out: Tensor) -> None:
        """With the whole matrix of a task, or the shared one."""
        key, size = self.bank.key(WHOLE), self.base.nbytes
        held = self.bank.held.get(key, task, size, lambda: (self.whole(task),))
        if held is None:
            inputs.blocks(self.of_task(task), out)
        else:
            inputs.matrix(*held, out)

    def factored(self, task: int, inputs: Inputs) -> bool:
        """Whether a task's change is a product, and takes less time as one than its matrix does."""
        bank, (m, n) = self.bank, self.base.shape
        longer = inputs.rows * (m + n) > LAID_OUT * m * n
        if not bank.serving.dense_above or longer:
            return False
        if task not in bank.ranks:
            product = bank.deltas[task].beyond_product(self._beside())
            bank.ranks[task] = None if product is None else product.rank
        return bank.ranks[task] is not None

    def factors(self, task: int) -> Scaled:
        """A task's change as (m, r), scales and (r, n), the factors in the backbone's type."""
        bank, dtype = self.bank, self.base.dtype

        def made() -> Scaled:
            return bank.deltas[task].scaled_product(self._beside(), dtype)

        nbytes = bank.ranks[task] * sum(self.base.shape) * dtype.itemsize
        return bank.held.get(bank.key(FACTORS), task, nbytes, made) or made()

    def _beside(self) -> Delta | None:
        """The shared part that factors are worked out against: bases decoded, all else as it is, of which they need nothing."""
        return self._shared() if self.bank.added is None else self.bank.added

    def _shared(self) -> Delta | None:
        """The shared part, decoded once where more than one task is made of it."""
        if self._decoded is None and self.bank.shared is not None:
            self._decoded = self.bank.shared.decoded()
        return self._decoded
