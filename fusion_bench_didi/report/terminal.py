"""A comparison as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .comparison import Comparison
from .tables import number
from .units import readable

LEGEND = (
    "Accuracy in %. retention: mean over tasks of accuracy / accuracy of the task's own model. x: stored beyond the backbone, in fine-tuned "
    "models. of all: with the backbone, against keeping every fine-tuned model."
)
#: columns where the output is no terminal
_WIDE = 150


def print_table(comparison: Mapping[str, Any], title: str = "") -> None:
    """Print the rows to standard output: with a column per task where there is room for them."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    made = table(comparison, title)
    if Measurement.get(console, console.options, made).minimum > console.width:
        made = table(comparison, title, per_task=False)
    console.print(made)
    console.print(Comparison(comparison).worded(LEGEND), highlight=False)


def table(
    comparison: Mapping[str, Any], title: str = "", *, per_task: bool = True
) -> Table:
    """The rows; those that failed say why."""
    made = Table(
        title=title or None, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    made.add_column("method", no_wrap=True)
    tasks = comparison["tasks"] if per_task else []
    heads = ("average", "retention", "x", "size", "of all", "seconds")
    for head in (*heads, *tasks):
        made.add_column(head, justify="right", no_wrap=True)
    for row in comparison["rows"]:
        if row["error"]:
            made.add_row(row["method"], "failed", *[""] * (len(heads) - 1 + len(tasks)))
            continue
        size, whole = row["bytes_excl"], row["x_incl"]
        made.add_row(
            row["method"],
            number(row["average"], 1, 100),
            number(row["retention"]["mean_of_ratios"], 1, 100),
            number(row["x_excl"], 2),
            "–" if size is None else readable(8 * size),
            number(None if whole is None else whole / len(comparison["tasks"]), 2),
            number(row["seconds"], 1),
            *(number(row["accuracy"].get(task), 0, 100) for task in tasks),
        )
    return made
