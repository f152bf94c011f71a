"""Merged models on the host's ``ModulatedModel`` and ``TaskModulator``."""

from .dynamic import DiDiModel, DynamicModel, TaskExpert

__all__ = ["DiDiModel", "DynamicModel", "TaskExpert"]
