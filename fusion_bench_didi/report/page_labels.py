"""Labels of the page's points: they keep their distance in pixels while the plot gets as wide as a screen lets it.

Places are found once, as for the printed pictures, in an area of the smallest width that shows labels. What would cover another
label in a wider one is left out, for pointing at a point tells its name too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import labels
from .style import look, new_figure

#: Pixels of the plotted area: the least width that has labels, the greatest that a page has, and its height.
LEAST, MOST, HEIGHT = 640, 1320, 430
_DPI = 100
#: font size in points, and as pixels of a screen
SIZE, PIXELS = 8, 11
#: so many pixels away, a label has a line to its point
_LINE_FROM = 24


def annotations(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colors: Sequence[str | None],
    bold: Sequence[bool],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> list[dict[str, Any]]:
    """Labels of points as Plotly's annotations.

    Args:
        points: as on the axes.
        colors: of the texts; None for the page's ink.
        bold: are placed first, and stay where two would cover one another.
    """
    if not points:
        return []
    with look():
        figure = new_figure(LEAST / _DPI, HEIGHT / _DPI)
        figure.set_dpi(_DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(x_range)
        axes.set_ylim(y_range)
        weights = ["bold" if b else "normal" for b in bold]
        boxes = labels.place(axes, points, texts, ["k"] * len(points), size=SIZE, weights=weights)  # fmt: skip
    places = axes.transData.transform(points)  # (N, 2)
    found = np.array([box.extents for box in boxes])  # (N, 4)
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: not bold[i]):
        if not any(_ever_meet(places[[i, j]], found[[i, j]]) for j in kept):
            kept.append(i)
    return [_annotation(points[i], texts[i], colors[i], bold[i], found[i].reshape(2, 2).mean(0) - places[i]) for i in sorted(kept)]  # fmt: skip


def _ever_meet(places: np.ndarray, boxes: np.ndarray) -> bool:
    """Whether two labels cover one another at some width; points move apart sideways, labels with them."""
    for width in np.linspace(LEAST, MOST, 30):
        moved = places[:, 0] * (width / LEAST - 1)
        left, right = boxes[:, 0] + moved, boxes[:, 2] + moved
        if left.max() < right.min() and boxes[:, 1].max() < boxes[:, 3].min():
            return True
    return False


def _annotation(
    point: tuple[float, float],
    text: str,
    color: str | None,
    bold: bool,
    away: np.ndarray,
) -> Mapping[str, Any]:
    far = np.linalg.norm(away) > _LINE_FROM and abs(away[1]) > PIXELS
    return {
        "x": point[0],
        "y": point[1],
        "ax": round(float(away[0]), 1),
        "ay": round(-float(away[1]), 1),
        "text": f"<b>{text}</b>" if bold else text,
        "font": {"size": PIXELS, **({"color": color} if color else {})},
        "arrowhead": 0,
        "arrowwidth": 0.5,
        "arrowcolor": (color or "#888888") if far else "rgba(0,0,0,0)",
        "standoff": 5,
        "borderpad": 0,
    }
