"""From low-rank modules to stored deltas."""

from torch import Tensor

from ..deltas.base import Delta
from ..deltas.precision import Precision
from ..lowrank.factored import as_dense
from ..lowrank.factors import Matrix, energy_of
from ..task_vectors.reader import matrix_shape

#: Stored forms of one matrix: the shared one, and one per task.
Stored = tuple[Delta | None, list[Delta | None]]


def pack_shared(
    shared: Matrix, rank: int, *, shape: tuple[int, ...], precision: Precision
) -> Delta | None:
    """Stored form of a shared module: whole at full rank, None at rank zero.

    Args:
        shared: (m, n), factored below full rank.
    """
    if rank >= min(matrix_shape(shape)):
        return precision.dense(shape, [(as_dense(shared).cpu(), None)])[0][0]
    return precision.low_rank(shape, shared.to("cpu"), None)[0] if rank else None


def _kept_out(first: Delta | None, delta: Delta | None, tau: Matrix) -> Tensor:
    """Squared error of what was really stored."""
    change = change_of(first, delta)
    return energy_of(tau if change is None else tau - change)


def change_of(first: Delta | None, delta: Delta | None = None) -> Matrix | None:
    """What is stored for one task, (m, n): factored where all of it is, None where nothing is.

    Args:
        first: the shared part.
        delta: the task's own.
    """
    last, below = (first, None) if delta is None else (delta, first)
    if last is None:
        return None
    product = last.product(below)
    return last.change(below).flatten(1) if product is None else product
