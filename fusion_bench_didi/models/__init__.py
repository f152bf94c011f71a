"""Merged models on the host's ``ModulatedModel`` and ``TaskModulator``."""

from ..serving.banks import Serving
from .dynamic import DiDiModel, DynamicModel
from .experts import TaskExpert

__all__ = ["DiDiModel", "DynamicModel", "Serving", "TaskExpert"]
