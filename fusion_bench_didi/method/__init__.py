"""The classes that YAML instantiates; they hold configuration, not mathematics."""

from .didi import DiDiMerging

__all__ = ["DiDiMerging"]
