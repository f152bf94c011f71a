"""Dense experts: every entry, quantized row by row straight from the checkpoints, so that no task vector is formed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...deltas.base import Delta
from ...deltas.precision import Precision
from ...deltas.sink import EncodedTensor
from ...lowrank.row_blocks import minus, squared_norms
from ...task_vectors.tensor import ChangedTensor
from ..context import MergeContext
from ..reconstruction import change_of


def encode_dense(
    context: MergeContext,
    tensor: ChangedTensor,
    kept: Sequence[bool],
    precision: Precision,
    shared: Delta | None = None,
) -> EncodedTensor:
    """One matrix whose experts are dense or not stored.

    Args:
        kept: (T,) whether a task's change is stored at all.
        shared: the shared part.
    """
    name = tensor.name
    base, tasks = change_of(shared), range(len(kept))
    experts: dict[int, Delta] = {}
    errors: dict[int, Tensor] = {}
    if shared is None:
        errors = dict(zip(tasks, context.energy[name]))
    for together in tensor.together:
        some = [task for task in together if kept[task]]
        others = [task for task in together if not kept[task]]
        if some:
            differences = minus(tensor.differences(some), base)
            made, lost = precision.dense(tensor.shape, differences)
            experts.update(zip(some, made))
            errors.update(zip(some, lost))
        if others and shared is not None:
            rest = minus(tensor.differences(others), base)
            errors.update(zip(others, squared_norms(rest)))
    return EncodedTensor(
        name,
        shared,
        [experts.get(task) for task in tasks],
        torch.stack([errors[task] for task in tasks]),
    )
