"""Merged models on the host's ``ModulatedModel`` and ``TaskModulator``."""

from .dynamic import DiDiModel, DynamicModel
from .experts import TaskExpert
from .tables import Serving

__all__ = ["DiDiModel", "DynamicModel", "Serving", "TaskExpert"]
