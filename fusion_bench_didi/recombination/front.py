"""The trade-offs that were found: Pareto front, three named picks, a plot."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .objectives import Evaluation

PICKS = ("performance", "balanced", "storage")


def pareto_front(evaluations: Sequence[Evaluation]) -> list[int]:
    """Indices of the undominated, least storage first; of equal ones the first."""
    order = sorted(
        range(len(evaluations)),
        key=lambda i: (evaluations[i].storage, -evaluations[i].performance, i),
    )
    front, best = [], -np.inf
    for i in order:
        if evaluations[i].performance > best:
            best = evaluations[i].performance
            front.append(i)
    return front


def knee(front: Sequence[Evaluation]) -> int:
    """The point of a front (least storage first) farthest above the line between its ends, both axes scaled to 1."""
    points = np.array([(e.storage, e.performance) for e in front])
    span = points[-1] - points[0]
    if len(front) < 3 or (span == 0).any():
        return len(front) - 1
    x, y = ((points - points[0]) / span).T
    return int((y - x).argmax())


def named_picks(front: Sequence[Evaluation]) -> dict[str, int]:
    """Index into the front of each named pick: its two ends and its knee."""
    picks = (len(front) - 1, knee(front), 0)
    return dict(zip(PICKS, picks))


def plot_front(
    evaluations: Sequence[Evaluation],
    directory: Path,
    *,
    others: Sequence[tuple[str, float, float]] = (),
    name: str = "front",
) -> list[Path]:
    """PNG and SVG of all evaluations, the front, the picks, and other methods as (label, storage, performance)."""
    from matplotlib.figure import Figure

    from ..report.style import color, look, save_figure

    front = [evaluations[i] for i in pareto_front(evaluations)]
    with look():
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.subplots()
        axes.scatter(
            [e.storage for e in evaluations],
            [100 * e.performance for e in evaluations],
            s=8,
            color=color("static"),
            alpha=0.5,
            label="evaluated",
        )
        axes.plot(
            [e.storage for e in front],
            [100 * e.performance for e in front],
            "-o",
            ms=3,
            color=color("dynamic"),
            drawstyle="steps-post",
            label="Pareto front",
        )
        for pick, i in named_picks(front).items():
            at = (front[i].storage, 100 * front[i].performance)
            axes.plot(*at, "o", ms=9, mfc="none", color=color("reference"))
            axes.annotate(
                pick, at, textcoords="offset points", xytext=(8, -12), fontsize=8
            )
        for label, storage, performance in others:
            at = (storage, 100 * performance)
            axes.plot(*at, "D", ms=5, color=color("ours"))
            axes.annotate(
                label, at, textcoords="offset points", xytext=(6, 3), fontsize=8
            )
        axes.set_xlabel("stored beyond the backbone, in fine-tuned models")
        axes.set_ylabel("mean performance, % of fine-tuned")
        axes.legend(loc="lower right")
        directory.mkdir(parents=True, exist_ok=True)
        files = [directory / f"{name}.{suffix}" for suffix in ("png", "svg")]
        for file in files:
            save_figure(figure, file)
    return files
