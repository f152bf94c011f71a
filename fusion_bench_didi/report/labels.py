"""Labels beside points that cover neither each other nor the points.

Greedy and deterministic: labels are placed one after the other, bold ones and crowded points first, each where it covers least and is
nearest to its point. Enough for some thirty labels; no dependency.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

_DISTANCES = (7, 12, 20, 30, 42, 56, 72, 90)
_ANGLES = [math.radians(a) for a in range(0, 360, 20)]


def place(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colors: Sequence[str],
    *,
    avoid: Sequence[tuple[float, float]] = (),
    size: float = 8,
    weights: Sequence[str] | None = None,
) -> list[Bbox]:
    """Annotate ``points``; call last, when limits and scales of the axes are final.

    Args:
        avoid: further points that labels should not cover, along a curve for instance.

    Returns:
        where the labels are, in pixels.
    """
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    pixels = [tuple(axes.transData.transform(p)) for p in points]
    obstacles = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in pixels]
    if axes.get_legend() is not None:
        obstacles.append(axes.get_legend().get_window_extent(renderer))
    obstacles += [
        Bbox.from_bounds(x - 2, y - 2, 4, 4)
        for x, y in map(axes.transData.transform, avoid)
    ]
    frame = axes.get_window_extent(renderer).padded(-1)
    scale = figure.dpi / 72
    taken: dict[int, Bbox] = {}
    weights = list(weights or ["normal"] * len(points))

    def turn(i: int):
        return weights[i] != "bold", -_crowd(i, pixels), points[i]

    for i in sorted(range(len(points)), key=turn):
        weight = weights[i]
        width, height = _extent(axes, renderer, texts[i], size, weight)
        candidates = [
            _box(pixels[i], angle, distance * scale, width, height)
            for distance in _DISTANCES
            for angle in _ANGLES
        ]
        best = min(
            candidates,
            key=lambda box: _cost(box, pixels[i], obstacles, taken.values(), frame)
            + _mistaken(box, i, pixels),
        )
        taken[i] = best
        _draw(axes, points[i], pixels[i], best, texts[i], colors[i], size, weight)
    return [taken[i] for i in range(len(points))]


def _crowd(i: int, pixels: Sequence[tuple[float, float]]) -> int:
    x, y = pixels[i]
    return sum(math.hypot(x - a, y - b) < 60 for a, b in pixels)


def _extent(axes, renderer, text, size, weight) -> tuple[float, float]:
    probe = axes.text(0, 0, text, fontsize=size, fontweight=weight)
    box = probe.get_window_extent(renderer)
    probe.remove()
    return box.width + 2, box.height + 1


def _box(point, angle, distance, width, height) -> Bbox:
    """The label's near edge is ``distance`` away from the point."""
    dx, dy = math.cos(angle), math.sin(angle)
    x = point[0] + dx * (distance + width / 2) - width / 2
    y = point[1] + dy * (distance + height / 2) - height / 2
    return Bbox.from_bounds(x, y, width, height)


def _cost(box: Bbox, point, obstacles, taken, frame: Bbox) -> float:
    covered = 3 * sum(_overlap(box, other) for other in obstacles)
    covered += 6 * sum(_overlap(box, other) for other in taken)
    outside = box.width * box.height - _overlap(box, frame)
    away = math.hypot(*(_nearest(box, point)[k] - point[k] for k in (0, 1)))
    return covered + 10 * outside + 0.6 * away


def _mistaken(box: Bbox, i: int, pixels) -> float:
    """A label nearer to another point than to its own reads as that point's."""

    def away(point) -> float:
        near = _nearest(box, point)
        return math.hypot(near[0] - point[0], near[1] - point[1])

    own = away(pixels[i])
    return sum(60.0 for j, p in enumerate(pixels) if j != i and away(p) < own + 2)


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _nearest(box: Bbox, point) -> tuple[float, float]:
    return (
        min(max(point[0], box.x0), box.x1),
        min(max(point[1], box.y0), box.y1),
    )


def _draw(axes, point, pixel, box: Bbox, text, color, size, weight) -> None:
    inverse = axes.transData.inverted()
    center = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
    axes.text(
        *inverse.transform(center),
        text,
        ha="center",
        va="center",
        color=color,
        fontsize=size,
        fontweight=weight,
        zorder=6,
    )
    edge = _nearest(box, pixel)
    if math.hypot(edge[0] - pixel[0], edge[1] - pixel[1]) > 14:
        x, y = inverse.transform(edge)
        axes.plot([point[0], x], [point[1], y], color=color, lw=0.5, alpha=0.6)
