"""The type of products under ``torch.autocast``, which casts what plain layers multiply but not what is multiplied into a given tensor."""

import torch
from torch import Tensor


def product_dtype(device: torch.device) -> torch.dtype | None:
    """Type that products on a device are cast to, or None where they are not."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def as_multiplied(x: Tensor) -> Tensor:
    """A tensor as a plain layer would multiply it."""
    dtype = product_dtype(x.device)
    eligible = x.is_floating_point() and x.dtype != torch.float64
    return x if dtype is None or not eligible else x.to(dtype)
