"""Calls without gradients, refused where one is asked for: an optimizer passes over what was given none, and nothing would say so."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import DiDiError
from .trees import children

Function = TypeVar("Function", bound=Callable[..., Any])


def forward_only(function: Function) -> Function:
    """A function that runs samples of several tasks under ``torch.no_grad``; its first argument holds the backbone.

    Raises:
        DiDiError: if something that is given, or a weight of the backbone, is to get a gradient.
    """

    @functools.wraps(function)
    def run(holder: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            _check(holder.backbone, args, kwargs)
        with torch.no_grad():
            return function(holder, *args, **kwargs)

    return run


def _check(backbone: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if any(p.requires_grad for p in backbone.parameters()):
        found = "the backbone (requires_grad_(True))"
        way_out = (
            "take a task's plain model, materialize(...).requires_grad_(True): a task that is set is written into the backbone anew each "
            "time, and what was trained there is lost"
        )
    elif _asks((args, kwargs)):
        found = "an input"
        way_out = "set one task at a time with set_task(...), through which they flow"
    else:
        return
    raise DiDiError(
        f"Gradients are asked of {found}, and batches of several tasks have none. Run it under torch.no_grad() where none is needed; "
        f"to train, {way_out}."
    )


def _asks(value: Any) -> bool:
    """Whether a tensor in nested containers requires a gradient; torch.compile traces this."""
    held = children(value)
    if held is None:
        return isinstance(value, Tensor) and value.requires_grad
    return any(_asks(one) for one in held.values())
