"""From single rows to ``comparison.json``: what follows from the rows, computed in one place."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..report.comparison import Comparison, mean
from .entries import Entry
from .sizes import PoolFacts

FORMAT = 1
RETENTION = {
    "mean_of_ratios": "mean over tasks of accuracy / accuracy of the task's own fine-tuned model",
    "ratio_of_averages": "average accuracy / average accuracy of the fine-tuned models",
}


SIZES = ("x_excl", "x_incl", "bytes_excl", "bytes_incl")
COSTS = ("seconds", "peak_gb", "added_gb")
#: of a row, beside those of its tasks; None while they are not known
FIGURES = (*SIZES, *COSTS, "budget")


def blank_row(entry: Entry, declared: Mapping[str, Any]) -> dict[str, Any]:
    """A row before anything is known."""
    return {
        "key": entry.key,
        "method": entry.name,
        "entry": dict(declared),
        "complete": False,
        "error": None,
        "accuracy": {},
        "loss": {},
        **dict.fromkeys(FIGURES),
        "notes": [],
    }


def assemble(
    rows: Sequence[Mapping[str, Any]],
    *,
    entries: Sequence[Entry],
    settings: Mapping[str, Any],
    tasks: Sequence[str],
    facts: PoolFacts,
) -> dict[str, Any]:
    """The comparison as it is written.

    What a row only says about itself (label, group, notes, ...) is taken from the entry as it is now, so that such
    changes need no new run.
    """
    asked = {entry.key: entry for entry in entries}
    own = next((r for r in rows if r["entry"]["method"] == "individuals"), None)
    reference = own["accuracy"] if own else {}
    made = [_row(row, asked[row["key"]], tasks, reference) for row in rows]
    worded = Comparison({"tasks": tasks, "rows": made}).worded
    return {
        "format": FORMAT,
        "tasks": list(tasks),
        "retention": {key: worded(text) for key, text in RETENTION.items()},
        "unit_bytes": facts.unit_bits // 8,
        "rows": made,
        "config": {
            k: v for k, v in settings.items() if k not in ("versions", "format")
        },
        "versions": settings["versions"],
    }


def made() -> dict[str, str]:
    """How and when a comparison was made, for its page: the command as it was typed, and the hour."""
    program = Path(sys.argv[0])
    # of python -m the package's directory says more than its __main__.py
    name = program.parent.name if program.stem == "__main__" else program.name
    return {
        "command": shlex.join([name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _row(
    row: Mapping[str, Any],
    entry: Entry,
    tasks: Sequence[str],
    reference: Mapping[str, float],
) -> dict[str, Any]:
    accuracy = {task: row["accuracy"].get(task) for task in tasks}
    return {
        "method": entry.name,
        "key": entry.key,
        "group": entry.group,
        "family": entry.family,
        "error": row["error"],
        "accuracy": accuracy,
        "average": mean(list(accuracy.values())),
        "retention": retention(accuracy, reference),
        **{k: row[k] for k in SIZES},
        "published_x": entry.published_x,
        **{k: row[k] for k in ("budget", *COSTS)},
        "uses_data": entry.uses_data,
        "routing": entry.routing,
        "notes": "; ".join(filter(None, [entry.notes, *row["notes"]])),
        **{k: row[k] for k in _DETAILS if k in row},
    }


_DETAILS = (
    *("loss", "metrics", "bytes_written", "bytes_of_headers", "traceback"),
    *("relative_error", "ranks", "energy_kept", "config"),
)


def retention(
    accuracy: Mapping[str, float | None], reference: Mapping[str, float]
) -> dict[str, float | None]:
    """Both conventions of the literature, see :data:`RETENTION`; None where a figure is missing or below zero, or a reference zero."""
    pairs = [(value, reference.get(task)) for task, value in accuracy.items()]
    if not pairs or any(a is None or a < 0 or not b or b < 0 for a, b in pairs):
        return dict.fromkeys(RETENTION)
    return {
        "mean_of_ratios": sum(a / b for a, b in pairs) / len(pairs),
        "ratio_of_averages": sum(a for a, _ in pairs) / sum(b for _, b in pairs),
    }
