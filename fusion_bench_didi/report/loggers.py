"""Figures for the loggers of a Fabric: TensorBoard, CSV, wandb, and whatever else a user chose."""

from collections.abc import Mapping
from typing import Any

from .metrics import metric_of


def log_metrics(fabric: Any, metrics: Mapping[str, float | None]) -> None:
    """Hand figures to every logger, and have it write them at once; those that are unknown are left out."""
    known = {name: value for name, value in metrics.items() if value is not None}
    if not fabric._loggers or not known or not fabric.is_global_zero:
        return
    fabric.log_dict(known)
    for logger in fabric.loggers:
        logger.save()


def row_metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a row of a comparison, by its key."""
    figures = {
        "average": row["average"],
        "retention": row["retention"]["mean_of_ratios"],
        **{key: row[key] for key in ("x_excl", "x_incl", "seconds")},
        **{f"{metric_of(row, t)}/{t}": v for t, v in row["accuracy"].items()},
    }
    return {f"{row['key']}/{name}": value for name, value in figures.items()}
