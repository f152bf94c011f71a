"""The trade-offs that were found: Pareto front, three named picks, a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .objectives import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def plot_front(evaluations: Sequence[Evaluation], directory: Path) -> list[Path]:
    """PNG and SVG of :func:`draw_front`."""
    from ..report.style import save_figure

    figure = draw_front(evaluations)
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"front.{suffix}" for suffix in ("png", "svg")]
    for file in files:
        save_figure(figure, file)
    return files


def draw_front(
    evaluations: Sequence[Evaluation],
    *,
    others: Sequence[tuple[str, float, float]] = (),
    suite: str = "",
) -> "Figure":
    """All evaluations, the front and its picks; beside it the corner where the front lies.

    Args:
        others: other methods as label, storage, performance.
        suite: what the models are called by.
    """
    from ..report.findings import KEPT
    from ..report.style import headline, look, new_figure

    front = [evaluations[i] for i in pareto_front(evaluations)]
    picks = [(p, *_point(front[i])) for p, i in named_picks(front).items()]
    rivals = [(n, storage, 100 * p) for n, storage, p in others]
    steps = [_point(e) for e in front]
    (low, high), (bottom, top) = _corner(steps)
    with look():
        figure = new_figure(10.5, 4.4)
        whole, near = figure.subplots(1, 2)
        for axes in (whole, near):
            _draw_points(axes, [_point(e) for e in evaluations], steps, picks, rivals)
            axes.set_xlabel("stored beyond the backbone, in fine-tuned models")
        near.set_xlim(low, high)
        near.set_ylim(bottom, top)
        whole.set_title("Everything that was tried")
        near.set_title("The corner of the front")
        whole.set_ylabel("mean performance, % of fine-tuned")
        whole.legend(loc="lower right")
        kept = [at for at in steps if at[1] >= 100 * KEPT]
        x, y = kept[0] if kept else steps[-1]
        headline(figure, f"{suite and f'{suite}: '}{len(evaluations)} trials find {y:.1f} % of fine-tuned in {x:.2f} models")  # fmt: skip
        figure.tight_layout()
        inside = [r for r in rivals if low <= r[1] <= high and bottom <= r[2] <= top]
        _label(whole, [r for r in rivals if r not in inside], [], steps)
        _label(near, inside, picks, steps)
    return figure


def _draw_points(axes, tried, steps, picks, rivals) -> None:
    """Points (storage, performance); picks and rivals have a name before."""
    from ..report.style import color

    def draw(points, marks: str, role: str, label: str, **style) -> None:
        axes.plot(*zip(*points), marks, color=color(role), label=label, **style)

    draw(tried, "o", "static", "tried by the search", ms=3, mew=0, alpha=0.45)
    draw(steps, "-o", "dynamic", "its front", ms=4, drawstyle="steps-post")
    named = [at for _, *at in picks]
    draw(named, "o", "reference", "named picks", ms=9, mfc="none")
    if rivals:
        draw([at for _, *at in rivals], "D", "ours", "other methods", ms=5)


def _point(evaluation: Evaluation) -> tuple[float, float]:
    return evaluation.storage, 100 * evaluation.performance


def _corner(steps: Sequence[tuple[float, float]]) -> NDArray:
    """Limits of both axes around a front, with room for labels."""
    points = np.array(steps)
    low, high = points.min(0), points.max(0)
    span = np.maximum(high - low, (0.05, 1.0))
    return np.stack([low - 0.35 * span, high + 0.45 * span], axis=1)


def _label(axes, shown, strong, steps) -> None:
    from ..report.labels import place
    from ..report.style import color

    if not (named := [*shown, *strong]):
        return
    place(
        axes,
        [at for _, *at in named],
        [name for name, *_ in named],
        [color("ours")] * len(shown) + [color("reference")] * len(strong),
        avoid=_along(steps) if strong else (),
        weights=["normal"] * len(shown) + ["bold"] * len(strong),
    )


def _along(steps: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points on the line of a front that is drawn in steps."""
    found = []
    for (x0, y0), (x1, y1) in zip(steps, steps[1:]):
        found += [(x0 + (x1 - x0) * k / 20, y0) for k in range(21)]
        found += [(x1, y0 + (y1 - y0) * k / 10) for k in range(11)]
    return found
