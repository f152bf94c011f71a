"""Saving of dynamic models through any host model pool."""

import functools
from typing import Any

from .dynamic import DynamicModel

_MARK = "_didi_saving"


def attach_saving(modelpool: Any) -> None:
    """Make ``modelpool.save_model`` write dynamic models by their own ``save_pretrained``.

    The host's pools would write a pickle of the state dict, or call the backbone's ``save_pretrained``, which saves one
    task's weights as if they were the model.
    """
    if getattr(modelpool, _MARK, False):
        return
    setattr(modelpool, _MARK, True)
    stock = modelpool.save_model

    @functools.wraps(stock)
    def save_model(model: Any, path: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, DynamicModel):
            model.save_pretrained(path, **kwargs)
        else:
            stock(model, path, *args, **kwargs)

    modelpool.save_model = save_model
