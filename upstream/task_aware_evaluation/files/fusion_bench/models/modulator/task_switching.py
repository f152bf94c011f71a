"""Telling a model that holds one set of weights per task which task comes next."""

from typing import Any, Optional

from torch import nn


def find_switchable(model: Any) -> Optional[Any]:
    """
    Find the object with a method ``set_task``, in a model or in what wraps it.

    Args:
        model: A model, a classifier around it, or a Fabric wrapper around either.

    Returns:
        The first object with ``set_task`` in its class; None for models that are the
        same for every task.
    """
    candidates = model.modules() if isinstance(model, nn.Module) else (model,)
    for candidate in candidates:
        # asked of the class: wrappers forward unknown attributes to what they hold
        if callable(getattr(type(candidate), "set_task", None)):
            return candidate
    return None


def set_task(model: Any, task_name: str) -> bool:
    """
    Make a model that of a task, if it depends on the task at all.

    Args:
        model: As for :func:`find_switchable`.
        task_name: The name under which the task pool holds the task.

    Returns:
        Whether there was anything to switch.

    Raises:
        ValueError: By the model, for a task that it does not know.
    """
    switchable = find_switchable(model)
    if switchable is None:
        return False
    switchable.set_task(task_name)
    return True
