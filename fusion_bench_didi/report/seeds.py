"""One comparison of several that differ in their seeds: means, and the ranges of each method's average and retention."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DiDiError
from .comparison import Comparison, mean

#: Figures of a row whose mean over seeds stands in their place.
_MEANS = ("average", "x_excl", "x_incl", "bytes_excl", "bytes_incl", "seconds")


def over_seeds(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The content of ``comparison.json`` over several runs of the same tasks and methods; ranks and the like are the first's.

    Raises:
        DiDiError: if tasks or methods are not the same.
    """
    first, *others = comparisons
    names = [row["method"] for row in first.rows]
    for other in others:
        if (other.tasks, [r["method"] for r in other.rows]) != (first.tasks, names):
            raise DiDiError(
                "Comparisons of several seeds must have the same tasks and methods, in one order. Run them with the same command but "
                "for the seed and the directory."
            )
    rows = [_row(group) for group in zip(*(c.rows for c in comparisons))]
    seeds = [c.config.get("seed") for c in comparisons]
    config = {**first.config, "seed": seeds}
    return {**first.data, "rows": rows, "config": config}


def _row(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A method's rows as one; the first that failed, if one did."""
    if failed := next((row for row in group if row["error"]), None):
        return dict(failed)
    row = dict(group[0])
    row |= {key: mean([r[key] for r in group]) for key in _MEANS}
    for key in ("accuracy", "retention"):
        row[key] = {k: mean([r[key][k] for r in group]) for k in group[0][key]}
    averages = [r["average"] for r in group if r["average"] is not None]
    row["over_seeds"] = [min(averages), max(averages)] if averages else None
    kept = [r["retention"]["mean_of_ratios"] for r in group]
    known = not any(value is None for value in kept)
    row["retention_over_seeds"] = [min(kept), max(kept)] if known else None
    return row
