"""What a caller says of the tasks of a batch: one per sample by position or by name, or weights over all tasks."""

from collections.abc import Mapping, Sequence, Set
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DiDiError, UnknownTaskError


def task_numbers(task_ids: Any, tasks: Sequence[str]) -> Tensor:
    """Positions of tasks, one per sample.

    Args:
        task_ids: one per sample, as a tensor, an array or a sequence of positions in ``tasks`` and names; their number, or
            None, is the shared model.

    Returns:
        (B,) int64 in 0 ... T.

    Raises:
        UnknownTaskError: for names and positions that are not there.
        DiDiError: for anything but positions and names.
    """
    if isinstance(task_ids, (Tensor, np.ndarray)) and task_ids.ndim != 1:
        raise DiDiError(
            f"task_ids are {tuple(task_ids.shape)}, expected one dimension: a task per sample."
        )
    if isinstance(task_ids, Tensor):
        if not _whole(task_ids):
            raise DiDiError(
                f"task_ids are {task_ids.dtype}, expected positions among {list(tasks)}, or names."
            )
        _check_held(task_ids, "task_ids")
        ids = task_ids.long()
    else:
        ids = _listed(task_ids, tasks)
    # compiled, the product by task finds it out
    if not torch.compiler.is_compiling() and len(ids):
        low, high = ids.aminmax()
        if low < 0 or high > len(tasks):
            raise _no_task(ids.tolist(), tasks)
    return ids


def _no_task(ids: Sequence[Any], tasks: Sequence[str]) -> UnknownTaskError:
    return UnknownTaskError(
        f"task_ids {list(map(int, ids))} are not all in 0 ... {len(tasks)}: the merged model holds {list(tasks)}, and "
        f"{len(tasks)} is the shared model."
    )


def _listed(task_ids: Any, tasks: Sequence[str]) -> Tensor:
    texts, unordered = (str, bytes), (Set, Mapping)
    if isinstance(task_ids, unordered):
        raise DiDiError(
            f"task_ids are a {type(task_ids).__name__}, which has no order; give a list, one task per sample."
        )
    if isinstance(task_ids, texts) or not hasattr(task_ids, "__iter__"):
        raise DiDiError(
            f"task_ids={task_ids!r} is no sequence; give one task per sample, such as [{task_ids!r}] * batch."
        )
    numbers = {task: position for position, task in enumerate(tasks)}
    ids = []
    for task in task_ids:
        if task is None:
            ids.append(len(tasks))
        elif isinstance(task, str):
            if task not in numbers:
                raise UnknownTaskError(
                    f"Task {str(task)!r} is not in the merged model, which holds {list(tasks)}."
                )
            ids.append(numbers[task])
        elif _is_position(task):
            if not 0 <= task <= len(tasks):
                raise _no_task([task], tasks)
            ids.append(int(task))
        else:
            raise DiDiError(
                f"task_ids hold {task!r}, expected positions among {list(tasks)}, names, or None for the shared model."
            )
    return torch.tensor(ids, dtype=torch.long, device="cpu")


def _is_position(task: Any) -> bool:
    if isinstance(task, Tensor):
        return task.ndim == 0 and _whole(task)
    return isinstance(task, Integral) and not isinstance(task, (bool, np.bool_))


def _whole(numbers: Tensor) -> bool:
    other = numbers.is_floating_point() or numbers.is_complex()
    return not other and numbers.dtype != torch.bool


def _check_held(numbers: Tensor, name: str) -> None:
    if numbers.layout != torch.strided or numbers.is_meta:
        raise DiDiError(
            f"{name} are a tensor of layout {numbers.layout} on {numbers.device}, expected plain numbers in memory."
        )


def checked_weights(task_weights: Any, tasks: Sequence[str]) -> Tensor:
    """Weights over tasks, checked.

    Args:
        task_weights: (B, T) as a tensor, an array or rows.

    Raises:
        DiDiError: for another shape, and for what is not finite.
    """
    weights = task_weights
    if not isinstance(weights, Tensor):
        try:
            found = np.asarray(weights)
            if not np.iscomplexobj(found):
                found = found.astype(np.float32)
            weights = torch.as_tensor(found, device="cpu")
        except (TypeError, ValueError):
            raise DiDiError(
                f"task_weights={task_weights!r} are no matrix of numbers, one row per sample."
            ) from None
    if weights.is_complex():
        raise DiDiError(f"task_weights are {weights.dtype}, expected real numbers.")
    if weights.ndim != 2 or weights.shape[1] != len(tasks):
        raise DiDiError(
            f"task_weights are {tuple(weights.shape)}, expected one row per sample and {len(tasks)} columns, for {list(tasks)}."
        )
    _check_held(weights, "task_weights")
    if not weights.is_floating_point():
        weights = weights.float()
    if not torch.compiler.is_compiling() and not weights.isfinite().all():
        raise DiDiError("task_weights hold NaN or infinity.")
    return weights
