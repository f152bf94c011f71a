"""What stored deltas reproduce, and how far that is from a task vector."""

from torch import Tensor

from ..deltas.base import Delta, last_of
from ..deltas.precision import Precision
from ..lowrank.factored import as_dense
from ..lowrank.factors import Matrix, energy_of
from ..task_vectors.tensor import matrix_shape


def encode_shared(
    shared: Matrix, rank: int, *, shape: tuple[int, ...], precision: Precision
) -> Delta | None:
    """A shared module (m, n), factored below full rank, as it is stored: dense at full rank, None at rank zero."""
    if rank >= min(matrix_shape(shape)):
        return precision.dense(shape, [(as_dense(shared).cpu(), None)])[0][0]
    return precision.low_rank(shape, shared.to("cpu"), None)[0] if rank else None


def squared_error(shared: Delta | None, delta: Delta | None, tau: Matrix) -> Tensor:
    """Squared norm of what is not reproduced of a task vector (m, n), float64."""
    change = change_of(shared, delta)
    return energy_of(tau if change is None else tau - change)


def change_of(shared: Delta | None, delta: Delta | None = None) -> Matrix | None:
    """The stored change of one task, (m, n): factored where all of it is, None where nothing is stored.

    Args:
        shared: the shared part.
        delta: the task's own.
    """
    last, below = last_of(delta, shared)
    if last is None:
        return None
    product = last.product(below)
    return last.change(below).flatten(1) if product is None else product
