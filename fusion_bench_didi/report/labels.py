"""Labels beside points that cover neither each other nor the points.

Greedy and deterministic: labels are placed one after the other, bold ones and crowded points first, each where it covers least and is
nearest to its point. Enough for some thirty labels. Boxes are rows ``x0, y0, x1, y1`` in pixels. Letters: ``N`` points,
``M`` obstacles, ``K`` places to choose from.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

_DISTANCES = np.array([7, 12, 20, 30, 42, 56, 72, 90])
_ANGLES = np.radians(np.arange(0, 360, 20))
#: a label is farther than this from its point only with a line between them
_LINE_FROM = 14


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
    axes.figure.canvas.draw()
    renderer, inverse = axes.figure.canvas.get_renderer(), axes.transData.inverted()
    pixels = axes.transData.transform(points)  # (N, 2)
    between = axes.transData.transform(np.reshape(avoid, (-1, 2)))
    legend = axes.get_legend()
    hidden = (
        [legend.get_window_extent(renderer).extents] if legend else np.empty((0, 4))
    )
    obstacles = np.concatenate([_squares(pixels, 5), _squares(between, 2), hidden])
    frame = axes.get_window_extent(renderer).padded(-1).extents
    weights = weights or ["normal"] * len(points)
    crowd = (np.linalg.norm(pixels[:, None] - pixels, axis=-1) < 60).sum(1)
    taken: dict[int, NDArray] = {}

    def turn(i: int):
        return weights[i] != "bold", -crowd[i], points[i]

    for i in sorted(range(len(points)), key=turn):
        label = axes.text(
            *points[i],
            texts[i],
            ha="center",
            va="center",
            color=colors[i],
            fontsize=size,
            fontweight=weights[i],
            zorder=6,
        )
        extent = label.get_window_extent(renderer)
        sides = np.array([extent.width + 2, extent.height + 1])
        boxes = _around(pixels[i], sides, axes.figure.dpi / 72)  # (K, 4)
        covered = 3 * _overlaps(boxes, obstacles).sum(1)
        on_others = _overlaps(boxes, np.reshape([*taken.values()], (-1, 4))).sum(1)
        # a little of another label is worse than a long way: neither can be read
        covered += 6 * on_others + 100 * (on_others > 0)
        outside = sides.prod() - _overlaps(boxes, frame[None])[:, 0]
        away = np.linalg.norm(_nearest(boxes, pixels) - pixels, axis=-1)  # (K, N)
        own = away[:, i]
        # a label that is nearer to another point than to its own reads as that point's
        mistaken = (np.delete(away, i, 1) < own[:, None] + 2).sum(1)
        cost = covered + 10 * outside + 0.6 * own + 60 * mistaken
        best = int(cost.round(6).argmin())  # of equal ones the first, on any machine
        taken[i] = boxes[best]
        label.set_position(inverse.transform(boxes[best].reshape(2, 2).mean(0)))
        if own[best] > _LINE_FROM:
            end = inverse.transform(_nearest(boxes[best, None], pixels[i, None])[0, 0])
            line = zip(points[i], end)
            axes.plot(*line, color=colors[i], lw=0.5, alpha=0.6)
    return [Bbox.from_extents(taken[i]) for i in range(len(points))]


def _squares(centers: NDArray, half: float) -> NDArray:
    return np.concatenate([centers - half, centers + half], axis=1)


def _around(point: NDArray, sides: NDArray, scale: float) -> NDArray:
    """Boxes whose near edges are the distances away from the point, nearest first (K, 4)."""
    direction = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=-1)
    reach = scale * _DISTANCES[:, None, None] + sides / 2
    centers = (point + direction * reach).reshape(-1, 2)
    return np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)


def _overlaps(boxes: NDArray, others: NDArray) -> NDArray:
    """(K, M) areas that boxes (K, 4) and others (M, 4) have in common."""
    boxes = boxes[:, None]
    low = np.maximum(boxes[..., :2], others[:, :2])
    high = np.minimum(boxes[..., 2:], others[:, 2:])
    return (high - low).clip(0).prod(-1)


def _nearest(boxes: NDArray, points: NDArray) -> NDArray:
    """(K, N, 2): where each box (K, 4) comes nearest to each point (N, 2)."""
    return points.clip(boxes[:, None, :2], boxes[:, None, 2:])
