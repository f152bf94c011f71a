"""Matrices whose experts are stored whole: their row of the table, and rounding them without forming task vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...allocation.spectra import MatrixSpectra
from ...deltas.base import Delta
from ...deltas.precision import Precision
from ...lowrank.row_blocks import minus, squared_norms
from ..context import Work
from ..reconstruction import change_of


def row_of_whole(
    work: Work, name: str, precision: Precision, energy: Tensor, *, shared: int = 0
) -> MatrixSpectra:
    """The table row of a matrix of which nothing but the energy is known.

    Args:
        energy: (T,) squared norms of what a shared part of rank ``shared`` leaves.
    """
    energy = energy.float()
    return MatrixSpectra(
        name,
        work.shape(name),
        sigma=torch.zeros(len(energy) + 1, 0),
        tail_energy=torch.cat([energy.new_zeros(1), energy]),
        weights=work.weights[name].cpu(),
        rate=precision.rate(*work.shape(name)),
        shared_rank=shared,
    )


def pack_whole(
    work: Work,
    name: str,
    kept: Sequence[bool],
    precision: Precision,
    first: Delta | None = None,
) -> tuple[tuple[Delta | None, list[Delta | None]], Tensor]:
    """Stored forms of one matrix, rounded straight from the checkpoints, and (T,) squared errors.

    Args:
        kept: (T,) whether a task's change is stored at all.
        first: the shared part.

    Returns:
        the shared form and one per task; the errors.
    """
    vectors, shape = work.task_vectors, work.task_vectors.infos[name].shape
    base = change_of(first)
    stored = {task for task, keep in zip(vectors.tasks, kept) if keep}
    deltas: dict[str, Delta] = {}
    errors = {} if first is not None else dict(zip(vectors.tasks, work.energy[name]))
    for tasks in vectors.together(name):
        some = [task for task in tasks if task in stored]
        others = [task for task in tasks if task not in stored]
        if some:
            made, lost = precision.dense(shape, minus(vectors.terms(name, some), base))
            deltas.update(zip(some, made))
            errors.update(zip(some, lost))
        if others and first is not None:
            rest = minus(vectors.terms(name, others), base)
            errors.update(zip(others, squared_norms(rest)))
    forms = [deltas.get(task) for task in vectors.tasks]
    return (first, forms), torch.stack([errors[task] for task in vectors.tasks])
