"""Calls without gradients, refused where one is asked for: an optimizer passes over what was given none, and nothing would say so."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiDiError
from .trees import children


def check_forward_only(backbone: nn.Module, given: Any) -> None:
    """A batch of samples of several tasks runs without gradients.

    Args:
        given: to the call.

    Raises:
        DiDiError: if something of it, or a weight of the backbone, is to get a gradient.
    """
    if not torch.is_grad_enabled():
        return
    if any(p.requires_grad for p in backbone.parameters()):
        found = "the backbone (requires_grad_(True))"
        way_out = (
            "take a task's plain model, materialize(...).requires_grad_(True): a task that is set is written into the backbone anew each "
            "time, and what was trained there is lost"
        )
    elif _asks(given):
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
