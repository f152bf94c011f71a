"""Which number of a task pool's report is compared, and what may be said of it: accuracies are shares, losses are not; and what the
loggers of a Fabric get."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

ACCURACY = "accuracy"
#: in names of figures of which less is better
_FALLING = re.compile(
    "loss|perplexity|entropy|error|distance|divergence|latency|seconds|"
    "(?<![a-z])(nll|ppl|[rn]?mse|mae|mape|err|[wct]er|bits|bp[bc]|brier|ece|kld?|fid|eer|f[pn]r)(?![a-z])"
)
#: in names of correlations, which end at -1
_SIGNED = re.compile("spearman|pearson|matthews|mcc|kendall|kappa|correlation")
#: what sums in float32 may be beyond 1
_ROUNDING = 1e-6


def falls(name: str) -> bool:
    """Whether less is better of figures of this name."""
    return _FALLING.search(name.lower()) is not None


def is_share(name: str, value: float) -> bool:
    """Whether a figure is what more is better of, and part of a whole: it may be given in per cent, averaged, and divided."""
    least = -1 if _SIGNED.search(name.lower()) else 0
    return not falls(name) and least <= value <= 1 + _ROUNDING


def figure(result: object) -> tuple[str, float] | None:
    """Name and value of what a task pool says of a task: its accuracy, else its first number of which more is better, else its
    first; None where there is none."""
    if _is_number(result):
        return "figure", float(result)
    if not isinstance(result, Mapping):
        return None
    numbers = {str(k): float(v) for k, v in result.items() if _is_number(v)}
    rising = (name for name in numbers if not falls(name))
    first = next(rising, next(iter(numbers), None))
    name = ACCURACY if ACCURACY in numbers else first
    return None if name is None else (name, numbers[name])


def metric_of(row: Mapping, task: str) -> str:
    """Name of a row's figure of a task; rows tell those that are no accuracy."""
    return row.get("metrics", {}).get(task, ACCURACY)


def odd_figures(row: Mapping) -> dict[str, float]:
    """Figures of a row by task that no comparison takes; rows of earlier versions may hold some."""
    told = ((task, value) for task, value in row["accuracy"].items() if value is not None)  # fmt: skip
    return {t: value for t, value in told if not is_share(metric_of(row, t), value)}


def named(metrics: Iterable[str]) -> str:
    """Names of figures, each once, in words."""
    return " and ".join(dict.fromkeys(metrics)) or ACCURACY


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


def _is_number(value: object) -> bool:
    """Python's numbers, and those of libraries: of no sides."""
    return hasattr(value, "__float__") and not getattr(value, "ndim", 0)
