"""What the page of the language suite shows beside the table of every comparison: perplexities, and what was generated."""

import math
from collections.abc import Mapping
from typing import Any

from fusion_bench_didi.report.comparison import Comparison

Losses = Mapping[str, float]


class Known(dict):
    """Figures by name; a dash for rows that were not made."""

    def __missing__(self, name: str) -> "Known":
        return Known()

    def __str__(self) -> str:
        return super().__str__() if self else "–"

    def __format__(self, how: str) -> str:
        return format(str(self), how)


def kept(found: Losses, base: Losses, own: Losses) -> float:
    """Mean over tasks of the fall of log-perplexity below the base model's, in units of the fall of the task's own model."""
    shares = [(base[t] - found[t]) / (base[t] - own[t]) for t in own]
    return sum(shares) / len(shares)


def fields(comparison: Comparison) -> dict[str, Any]:
    """For the notes: perplexities by method and task, the share kept by method, the table of both, and the examples."""
    rows = {row["method"]: row for row in comparison.good}
    base, own = rows["Pre-trained"]["loss"], rows["Individuals"]["loss"]
    shares = {name: kept(row["loss"], base, own) for name, row in rows.items()}
    measured = comparison.data.get("measured", {})
    return {
        "kept": Known({name: f"{100 * share:.1f}" for name, share in shares.items()}),
        "x": Known({name: f"{row['x_excl']:.2f}" for name, row in rows.items()}),
        "perplexity": {
            name: {task: f"{math.exp(loss):.2f}" for task, loss in row["loss"].items()}
            for name, row in rows.items()
        },
        "perplexities": "\n".join(_table(comparison, shares)),
        "examples": "\n".join(_examples(comparison.data.get("examples", {}))),
        "measured": Known({name: f"{value:.2f}" for name, value in measured.items()}),
    }


def _table(comparison: Comparison, shares: Mapping[str, float]) -> list[str]:
    tasks = comparison.tasks
    lines = [
        f"| method | {' | '.join(tasks)} | kept, % | x excl. |",
        "|---|" + "--:|" * (len(tasks) + 2),
    ]
    for row in comparison.good:
        cells = [f"{math.exp(row['loss'][task]):.2f}" for task in tasks]
        share = f"{100 * shares[row['method']]:.1f}"
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {share} | {row['x_excl']:.2f} |")  # fmt: skip
    return lines


def _examples(examples: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What the merged model and the base model go on with, as blocks."""
    lines = []
    for task, found in examples.items():
        lines += [f"**{task}**, from `{found['prompt'].strip()!r}`:", ""]
        for who in ("base", "merged"):
            lines += [f"{who}:", "", "```", *found[who].splitlines(), "```", ""]
    return lines
