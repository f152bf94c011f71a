"""Every stored form by the name that files know it by."""

from . import masks, plain, quantized, tucker
from .base import KINDS

__all__ = ["KINDS", "masks", "plain", "quantized", "tucker"]
