"""The printed plots, as PNG and SVG."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import findings, labels
from .comparison import Comparison, kind, percent
from .module_plots import energy_plot, rank_plot
from .style import KINDS, color, headline, look, new_figure, save_figure, title


def write(comparison: Comparison, directory: Path) -> list[Path]:
    """Every plot for which there are figures; those of an earlier report that has more are removed."""
    files = []
    with look():
        for name, picture in draw(comparison).items():
            png, svg = (directory / f"{name}.{suffix}" for suffix in ("png", "svg"))
            save_figure(picture, png)
            save_figure(picture, svg)
            files += [png, svg]
    for name in PICTURES:
        for suffix in ("png", "svg"):
            if (file := directory / f"{name}.{suffix}") not in files:
                file.unlink(missing_ok=True)
    return files


def draw(comparison: Comparison) -> dict[str, Figure]:
    """All pictures by file name; a picture for which the rows tell too little is left out."""
    made = {name: make(comparison) for name, make in PICTURES.items()}
    return {name: picture for name, picture in made.items() if picture is not None}


#: the line of a model that others are held against
_REFERENCE = {"color": "#222222", "lw": 0.8, "ls": (0, (4, 3))}
STORAGE_AXIS = "stored beyond the backbone, in fine-tuned models (square-root scale)"


def short_name(row, comparison: Comparison) -> str:
    """Points on a curve need not repeat its name: ``DiDi-S 1.24`` -> ``S 1.24``."""
    family = row.get("family")
    if len(comparison.families().get(family, ())) < 2:
        return row["method"]
    return row["method"].removeprefix(family).lstrip(" -") or row["method"]


def _root(x):
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x):
    return np.sign(x) * np.square(x)


def accuracy_vs_storage(comparison: Comparison) -> Figure | None:
    """The Pareto picture: every method a point, a family a curve; beside it the same from above."""
    rows = comparison.good
    if not rows:
        return None
    low = zoom_from(comparison)
    close = low is not None
    picture = new_figure(12.5 if close else 9, 6.2)
    widths = [2.6, 1] if close else [1]
    panels = picture.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    bars = "; bars: range over seeds" if comparison.over_seeds else ""
    metric = comparison.worded("accuracy")
    panels[0].set_ylabel(f"{metric}, mean of {len(comparison.tasks)} tasks (%){bars}")
    for axes in panels:
        _points(axes, comparison)
    if close:
        most = max(100 * r["average"] for r in rows)
        panels[0].set_ylim(low, most + 0.12 * (most - low))
        near = [r for r in rows if 100 * r["average"] >= low]
        _storage_axis(panels[0], max(r["x_excl"] for r in near))
        panels[1].set_title("All methods")
        panels[1].set_xlabel("stored, on the same scale")
    _storage_axis(panels[-1], max(r["x_excl"] for r in rows), few=close)
    panels[-1].margins(y=0.08)
    title(panels[0], findings.of_storage(comparison))
    panels[0].set_xlabel(STORAGE_AXIS)
    picture.legend(handles=_legend(rows), loc="lower center", ncols=6, fontsize=8)
    picture.tight_layout(rect=(0, 0.05, 1, 1))
    title(panels[0], findings.of_storage(comparison))  # as wide as the panel is now
    picture.tight_layout(rect=(0, 0.05, 1, 1))
    inside = [not close or 100 * r["average"] >= low for r in rows]
    for axes, here in zip(panels, (True, False)):
        _name(axes, [r for r, i in zip(rows, inside) if i == here], comparison)
    return picture


#: a second panel shows the rest where less than this share of the accuracies decides
_CROWDED = 0.45


def zoom_from(comparison: Comparison) -> float | None:
    """Accuracy from which on a panel of its own shows the methods; None where all fit into one."""
    values = sorted(100 * r["average"] for r in comparison.good)
    ours = [100 * r["average"] for r in comparison.good if kind(r) == "ours"]
    if not ours or len(values) < 12:
        return None
    low, high = min(ours), values[-1]
    low -= 0.35 * (high - low) + 0.5
    return low if high - low < _CROWDED * (high - values[0]) else None


def _points(axes: Axes, comparison: Comparison) -> None:
    for row in comparison.good:
        shade, marker, _, _ = KINDS[kind(row)]
        if bounds := row.get("over_seeds"):
            ends = [100 * value for value in bounds]
            axes.vlines(row["x_excl"], *ends, color=shade, lw=1.4, zorder=3)
        axes.plot(
            row["x_excl"],
            100 * row["average"],
            marker,
            color=shade,
            ms=7,
            zorder=4,
            mec="white",
            mew=0.7,
        )
    for family in comparison.families().values():
        ours = kind(family[0]) == "ours"
        axes.plot(
            *zip(*((r["x_excl"], 100 * r["average"]) for r in family)),
            color=color(kind(family[0])),
            lw=1.8 if ours else 1.2,
            ls="-" if ours else (0, (4, 2)),
            zorder=3,
        )
    for row in _references(comparison):
        axes.axhline(100 * row["average"], **_REFERENCE)


def _references(comparison: Comparison) -> list:
    return [r for r in comparison.good if r["group"] == "reference" and r["x_excl"] > 0]


_FEW_TICKS = (0, 0.5, 1, 2, 4, 8, 14, 30)
_TICKS = (0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10, 14, 20, 30, 50)


def _storage_axis(axes: Axes, most: float, *, few: bool = False) -> None:
    ticks = [t for t in (_FEW_TICKS if few else _TICKS) if t <= most * 1.05]
    axes.set_xscale("function", functions=(_root, _square))
    axes.set_xlim(-0.002 * max(most, 1), most * 1.25 + 0.02)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])


def _name(axes: Axes, rows, comparison: Comparison) -> None:
    """Labels of these rows, beside curves and dashed lines."""
    if not rows:
        return
    avoid = []
    for family in comparison.families().values():
        line = [(r["x_excl"], 100 * r["average"]) for r in family]
        for (x0, y0), (x1, y1) in zip(line, line[1:]):
            avoid += [
                (x0 + (x1 - x0) * k / 12, y0 + (y1 - y0) * k / 12) for k in range(13)
            ]
    most = axes.get_xlim()[1]
    for row in _references(comparison):
        avoid += [(most * (k / 120) ** 2, 100 * row["average"]) for k in range(121)]
    labels.place(
        axes,
        [(r["x_excl"], 100 * r["average"]) for r in rows],
        [short_name(r, comparison) for r in rows],
        [color(kind(r)) if kind(r) != "static" else "#5f5f5f" for r in rows],
        avoid=avoid,
        weights=["bold" if kind(r) == "ours" else "normal" for r in rows],
    )


def accuracy_by_task(comparison: Comparison) -> Figure | None:
    """One panel per task, one bar per method, in the table's order."""
    rows, tasks = comparison.good, [*comparison.tasks, "average"]
    if not rows:
        return None
    across = min(5, len(tasks))
    down = math.ceil(len(tasks) / across)
    height = 0.6 + 0.145 * len(rows)
    picture = new_figure(2.1 * across + 1.2, down * height + 0.7)
    grid = picture.subplots(down, across, sharey=True, squeeze=False)
    names = [r["method"] for r in rows]
    own = findings.own_models(comparison)
    for axes, task in zip(grid.flat, tasks):
        values = [percent(row, task) for row in rows]
        axes.barh(names, values, color=[color(kind(r)) for r in rows], height=0.78)
        if own:
            axes.axvline(values[rows.index(own)], **_REFERENCE)
        axes.set_title(task, fontsize=9)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", labelsize=7, length=0)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlim(0, max(values) * 1.08)
    grid[0, 0].set_ylim(len(rows) - 0.4, -0.6)  # shared: turns all
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    tall = picture.get_figheight()
    handles = _legend(rows, bars=True)
    if own:
        handles.append(Line2D([], [], label="the task's own model", **_REFERENCE))
    picture.legend(handles=handles, loc="lower center", ncols=7, fontsize=8)
    headline(picture, findings.of_tasks(comparison), y=1 - 0.05 / tall)
    picture.tight_layout(rect=(0, 0.3 / tall, 1, 1 - 0.3 / tall))
    return picture


_LINES = {"ours": "-", "variant": "--"}


def family_label(name: str, rows, label: str) -> str:
    """Variants are called by the names of their families."""
    families = {r["family"] for r in rows if kind(r) == name == "variant"}
    return ", ".join(sorted(families)) or label


def _legend(rows, *, bars: bool = False) -> list[Line2D]:
    there = {kind(r) for r in rows}
    return [
        Line2D(
            [],
            [],
            color=shade,
            marker="s" if bars else marker,
            label=family_label(name, rows, label),
            ls=_LINES.get(name, "") if not bars else "",
            ms=7,
            mec="white",
        )
        for name, (shade, marker, _, label) in KINDS.items()
        if name in there
    ]


PICTURES: dict[str, Callable[[Comparison], Figure | None]] = {
    "accuracy_vs_storage": accuracy_vs_storage,
    "accuracy_by_task": accuracy_by_task,
    "ranks": rank_plot,
    "energy_kept": energy_plot,
}
