"""A comparison as tables and plots want it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DiDiError
from ..files import from_home
from .metrics import ACCURACY, metric_of, named, odd_figures

Kind = Literal["reference", "static", "dynamic", "routed", "ours", "variant"]

#: in the order in which tables and legends show them
GROUPS = {
    "reference": "Reference",
    "static": "Static: one model for all tasks",
    "dynamic": "Dynamic: an expert per task",
    "routed": "Routed: every image finds its experts by itself",
}

#: keys of the rows that others are held against
REFERENCES = ("pretrained", "individuals")
#: how far above a run's directory a comparison is looked for
_LEVELS = 2
#: what is equal where figures of a comparison stand beside those of a run
_EQUAL = ("modelpool", "taskpool", "fast_dev_run")
#: what configurations of task pools called their class before, by what they call it now
_SAME_POOLS = {
    "fusion_bench_didi.taskpool.lm_eval_harness.lm_eval_pool": "fusion_bench.taskpool.LMEvalHarnessTaskPool",
}
#: of a row
FigureOf = Callable[[Mapping[str, Any]], float | None]

#: the family that is drawn as ours; other families are variants of it
OURS = "DiDi"


def told_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a comparison, with the values of those that files of earlier releases leave out."""
    pool = settings.get("taskpool")
    if isinstance(pool, Mapping):  # a pool that says nothing does as the program says
        asked = {"fast_dev_run": pool.get("fast_dev_run") or None}
        if pool.get("_target_") in _SAME_POOLS:
            asked["_target_"] = _SAME_POOLS[pool["_target_"]]
        settings = {**settings, "taskpool": {**pool, **asked}}
    return {"fast_dev_run": False, "precision": "32-true", **settings}


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of figures; None where one is missing, or all are."""
    if not values or any(value is None for value in values):
        return None
    return sum(values) / len(values)


def percent(row: Mapping[str, Any], task: str) -> float:
    """A row's accuracy on a task, or its ``average``, in per cent."""
    return 100 * (row["average"] if task == "average" else row["accuracy"][task])


@dataclass(frozen=True)
class Comparison:
    """Read-only view of ``comparison.json``."""

    data: Mapping[str, Any]

    @classmethod
    def read(cls, file: str | Path) -> "Comparison":
        """Read a comparison from a file; rows with figures that could not be shown have failed.

        Raises:
            DiDiError: if it holds no comparison.
        """
        try:
            data = json.loads(from_home(file).read_text(encoding="utf-8"))
            if not isinstance(data, dict) or not {"tasks", "rows"} <= data.keys():
                raise ValueError("it has no tasks and rows")
        except (OSError, ValueError, RecursionError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or error
            raise DiDiError(
                f"{file} is no comparison ({why}). Give a directory that didi_compare wrote, or run it again."
            ) from error
        return cls({**data, "rows": [_checked(row) for row in data["rows"]]})

    @classmethod
    def nearest(
        cls, directory: str | Path, settings: Mapping[str, Any]
    ) -> tuple[Path, "Comparison"] | None:
        """A comparison on equal pools in a run's directory, or up to two levels above, and its file.

        Args:
            settings: ``modelpool``, ``taskpool`` and ``fast_dev_run``, which must be equal.
        """
        asked = told_settings(settings)
        place = Path(directory).resolve()
        for folder in (place, *place.parents[:_LEVELS]):
            file = folder / "comparison.json"
            with suppress(DiDiError):
                found = cls.read(file)
                there = told_settings(found.config)
                if all(there.get(key) == asked[key] for key in _EQUAL):
                    return file, found
        return None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.data.get("config", {})

    @property
    def references(self) -> dict[str, dict[str, float]]:
        """Figures per task of the base model and of the fine-tuned models, by the keys of their rows."""
        known = (row for row in self.good if row["key"] in REFERENCES)
        return {row["key"]: dict(row["accuracy"]) for row in known}

    @property
    def tasks(self) -> list[str]:
        return self.data["tasks"]

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        return self.data["rows"]

    def metric(self, task: str) -> str:
        """What the figures of a task are: accuracies, unless a row says otherwise."""
        told = (row for row in self.rows if task in row.get("metrics", {}))
        return metric_of(next(told, {}), task)

    def worded(self, text: str) -> str:
        """A text on accuracies, as one on what the figures are."""
        metric = named(map(self.metric, self.tasks))
        if metric == ACCURACY:
            return text
        capital = metric[0].upper() + metric[1:]
        found = {"accuracy": metric, "Accuracy": capital, "Accuracies": capital}
        return re.sub("accuracy|Accuracy|Accuracies", lambda m: found[m[0]], text)

    @property
    def over_seeds(self) -> bool:
        """Whether rows are means over several seeds."""
        return any(row.get("over_seeds") for row in self.rows)

    def accuracies(self) -> list[tuple[str, FigureOf]]:
        """Head and figure of every column of accuracies: the tasks, and their average."""
        tasks = [(t, lambda row, t=t: row["accuracy"][t]) for t in self.tasks]
        return [*tasks, ("Average", lambda row: row["average"])]

    @property
    def good(self) -> list[Mapping[str, Any]]:
        """Rows with figures for every task."""
        return [r for r in self.rows if not r["error"] and r["average"] is not None]

    @property
    def failed(self) -> list[Mapping[str, Any]]:
        return [r for r in self.rows if r["error"]]

    def group(self, group: str) -> list[Mapping[str, Any]]:
        return [r for r in self.rows if r["group"] == group]

    def families(self) -> dict[str, list[Mapping[str, Any]]]:
        """Rows to be joined to curves, each by rising storage."""
        found: dict[str, list] = {}
        for row in self.good:
            if row.get("family"):
                found.setdefault(row["family"], []).append(row)
        return {
            family: sorted(rows, key=lambda r: r["x_excl"])
            for family, rows in found.items()
        }

    def with_ranks(self) -> list[Mapping[str, Any]]:
        """Rows that tell their ranks, by rising storage."""
        rows = [r for r in self.good if r.get("ranks") and kind(r) == "ours"]
        return sorted(rows, key=lambda r: r["x_excl"])

    def shown_in_detail(self) -> Mapping[str, Any] | None:
        """The row of the printed rank and energy plots: the one nearest to the paper's 1.4."""
        return min(
            self.with_ranks(), key=lambda r: abs(r["x_excl"] - 1.4), default=None
        )


def _checked(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row as it is; a failed one if it holds what is no share."""
    odd = odd_figures(row)
    if not odd:
        return row
    task, value = next(iter(odd.items()))
    told = f"{metric_of(row, task)} of {task} is {value:g}, which is not within 0 and 1. Run the comparison again."
    nothing = dict.fromkeys(row["retention"])
    error = row["error"] or told
    return {**row, "error": error, "average": None, "retention": nothing}


def kind(row: Mapping[str, Any]) -> Kind:
    """Kind of a row, by which it is colored: its group, or that it is ours, or a variant of ours."""
    family = row.get("family")
    if family:
        return "ours" if family == OURS else "variant"
    return row["group"]


def marker(
    comparison: Comparison,
    figure: FigureOf,
    marks: Sequence[str],
    text: Callable[[float | None], str],
) -> Callable[[Mapping[str, Any]], str]:
    """What writes a figure of a row: the best two of each group under marks, references as they are.

    Args:
        marks: formats for best and second best.
        text: of a figure without its mark.
    """
    groups = [group for group in GROUPS if group != "reference"]
    best = {group: best_two(comparison.group(group), figure) for group in groups}

    def written(row: Mapping[str, Any]) -> str:
        plain = text(figure(row))
        for mark, methods in zip(marks, best.get(row["group"], ())):
            if row["method"] in methods:
                return mark.format(plain)
        return plain

    return written


def best_two(
    rows: Sequence[Mapping[str, Any]], value: FigureOf
) -> tuple[set[str], set[str]]:
    """Methods with the highest and second highest value as it is printed (ties share a place)."""
    figures = {r["method"]: value(r) for r in rows if not r["error"]}
    printed = {m: round(100 * v, 1) for m, v in figures.items() if v is not None}
    if len(printed) < 2:
        return set(), set()
    first, *rest = sorted(set(printed.values()), reverse=True)
    second = rest[0] if rest else None
    return (
        {m for m, v in printed.items() if v == first},
        {m for m, v in printed.items() if v == second},
    )
