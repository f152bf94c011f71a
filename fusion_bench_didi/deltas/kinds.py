"""Every stored form by the name that files know it by."""

from . import banded, coded, entries, lossless, masks, plain, quantized, tucker
from .base import KINDS as KINDS
