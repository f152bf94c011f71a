"""Every stored form by the name that files know it by."""

from . import entries, masks, plain, quantized, tucker
from .base import KINDS

__all__ = ["KINDS", "entries", "masks", "plain", "quantized", "tucker"]
