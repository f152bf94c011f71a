"""The tasks of a batch's rows, some of which the router finds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import DynamicModel
from .batching import Row


def tasks_of(
    model: DynamicModel,
    rows: Sequence[Row],
    inputs: Mapping[str, Tensor],
) -> dict[str, Any]:
    """``task_ids``, or ``task_weights`` where some row has none.

    Args:
        inputs: of the rows, tensors whose first side they are; the router is given its rows of them.
    """
    tasks = model.tasks
    routed = torch.tensor([row.task is None for row in rows])
    if not routed.any():
        return {"task_ids": [row.task for row in rows]}
    some = {name: value[routed.to(value.device)] for name, value in inputs.items()}
    found = model.router.route(model, **some).float().cpu()
    weights = torch.zeros(len(rows), len(tasks))
    weights[routed] = found
    for place, row in enumerate(rows):
        if row.task is not None:
            weights[place, tasks.index(row.task)] = 1
    return {"task_weights": weights}
