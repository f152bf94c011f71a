"""A small canvas on which every picture of the demo suite is drawn.

One number, ``wildness`` in [0, 1], says how far a picture strays from a clean
sign-painter's version of its class: rotation, shear, faded ink, clutter, blur and
noise all grow with it. The base model is pre-trained on tame pictures and the tasks
are made of wild ones, which is what leaves room for fine-tuning.

Figures live in the square [-1, 1]² with y pointing down, and one random affine map
takes them to pixels, so a class is a handful of points and never worries about pose.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Iterable, Sequence

import matplotlib
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
"""Pixels of a finished picture's side."""

_ZOOM = 2  # figures are drawn larger and averaged down, which smooths their edges
_CANVAS = SIDE * _ZOOM
_TYPE_SIZE = 48  # text is set once at this size and then scaled

PRINT_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSans-Oblique")
"""The fonts of tame pictures."""

BOOK_FONTS = (
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSansMono-Bold"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmss10", "cmtt10", "cmb10"),
)
"""The fonts of wild pictures; none of them is seen in pre-training."""

Color = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


@lru_cache(maxsize=None)
def _lettering(text: str, face: str) -> Image.Image:
    """Text as a mask cut to its ink, in a font that matplotlib ships (none to install)."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    type_ = ImageFont.truetype(str(path), _TYPE_SIZE)
    room = 2 * _TYPE_SIZE * max(1, len(text))
    mask = Image.new("L", (room, 2 * _TYPE_SIZE))
    ImageDraw.Draw(mask).text(
        (room / 2, _TYPE_SIZE), text, fill=255, font=type_, anchor="mm"
    )
    return mask.crop(mask.getbbox())


def circle(
    radius: float = 1.0, center: tuple[float, float] = (0.0, 0.0), squash: float = 1.0
) -> Points:
    """A circle, or an upright ellipse, as a polygon: all figures are polygons."""
    return arc(0, 360, radius, center, squash)


def arc(
    start: float,
    stop: float,
    radius: float = 1.0,
    center: tuple[float, float] = (0.0, 0.0),
    squash: float = 1.0,
) -> Points:
    """Points along an arc; degrees run clockwise from the right, as y points down."""
    angles = np.radians(np.linspace(start, stop, 25))
    x = center[0] + radius * np.cos(angles)
    y = center[1] + radius * squash * np.sin(angles)
    return list(zip(x.tolist(), y.tolist()))


def regular(corners: int, *, turn: float = -90.0, inner: float = 1.0) -> Points:
    """A regular polygon, or a star when every second corner lies at ``inner``."""
    count = corners if inner == 1.0 else 2 * corners
    points = []
    for index in range(count):
        radius = inner if inner != 1.0 and index % 2 else 1.0
        angle = math.radians(turn + 360.0 * index / count)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def turned(points: Points, degrees: float) -> Points:
    """A figure turned clockwise about the origin."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(c * x - s * y, s * x + c * y) for x, y in points]


class Canvas:
    """A picture in the making: its colors, its pose, and how wild it is."""

    def __init__(
        self,
        rng: Generator,
        wildness: float,
        *,
        size: float = 0.75,
        turn: float = 25.0,
    ) -> None:
        self.rng = rng
        self.wildness = wildness
        self.paper, self.ink = self._contrasting_colors()
        self.image = Image.new("RGB", (_CANVAS, _CANVAS), self.paper)
        self._draw = ImageDraw.Draw(self.image)
        self._pose(size, turn)

    def _contrasting_colors(self) -> tuple[Color, Color]:
        """Paper and ink: dark on light when tame; when wild, closer and mostly reversed."""
        rng = self.rng
        gap = rng.uniform(200 - 80 * self.wildness, 225)
        dark = rng.uniform(10, 245 - gap)
        tint = 10 + 30 * self.wildness
        ink = dark + rng.uniform(-tint, tint, 3)
        paper = dark + gap + rng.uniform(-tint, tint, 3)
        if rng.random() < self.wildness:
            ink, paper = paper, ink
        return as_color(paper), as_color(ink)

    def _pose(self, size: float, turn: float) -> None:
        rng, wild = self.rng, self.wildness
        self.angle = angle = math.radians(rng.uniform(-1, 1) * (3 + (turn - 3) * wild))
        stretch = rng.uniform(1 - 0.18 * wild, 1 + 0.08 * wild, 2)
        half = _CANVAS / 2
        self.scale = size * rng.uniform(0.95 - 0.15 * wild, 1.05) * half
        slant = rng.uniform(-0.2, 0.2) * wild
        turned = np.array(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        )
        self._matrix = (
            self.scale * turned @ np.array([[stretch[0], slant], [0, stretch[1]]])
        )
        room = max(0.0, half - self.scale) * (0.15 + 0.45 * wild)
        self._shift = half + rng.uniform(-room, room, 2)

    def place(self, points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        """Convert figure coordinates to pixels."""
        placed = np.asarray(list(points)) @ self._matrix.T + self._shift
        return [(x, y) for x, y in placed.tolist()]

    def polygon(self, points: Points, fill: Color | None = None) -> None:
        self._draw.polygon(self.place(points), fill=fill or self.ink)

    def line(
        self, points: Points, width: float = 0.16, fill: Color | None = None
    ) -> None:
        """A stroke whose ``width`` is in figure coordinates."""
        pixels = max(2, round(width * self.scale))
        self._draw.line(
            self.place(points), fill=fill or self.ink, width=pixels, joint="curve"
        )

    def figure(self, points: Points, *, filled: bool) -> None:
        """A closed figure, either solid or as an outline."""
        if filled:
            self.polygon(points)
        else:
            closed = [*points, points[0], points[1]]
            self.line(closed, width=0.2)

    def text(
        self,
        text: str,
        face: str,
        *,
        height: float = 1.6,
        at: tuple[float, float] = (0.0, 0.0),
        fill: Color | None = None,
    ) -> None:
        """Text whose capitals are about 0.9 ``height`` high, turned with the pose."""
        mask = _lettering(text, face)
        zoom = 1.25 * height * self.scale / _TYPE_SIZE
        size = (max(2, round(mask.width * zoom)), max(2, round(mask.height * zoom)))
        mask = mask.resize(size, Image.Resampling.BILINEAR).rotate(
            -math.degrees(self.angle), Image.Resampling.BILINEAR, expand=True
        )
        (x, y), (w, h) = self.place([at])[0], mask.size
        corner = (round(x - w / 2), round(y - h / 2))
        self.image.paste(fill or self.ink, corner, mask)

    def clutter(self) -> None:
        """Stray strokes, the more the wilder; draw them before the figure."""
        rng = self.rng
        for _ in range(rng.poisson(1.2 * self.wildness)):
            ends = rng.uniform(0, _CANVAS, 4).tolist()
            blend = rng.uniform(0.2, 0.7)
            color = np.array(self.paper) * (1 - blend) + np.array(self.ink) * blend
            self._draw.line(ends, fill=as_color(color), width=int(rng.integers(1, 5)))

    def finish(self) -> np.ndarray:
        """Average down to the final size and expose: light, focus and grain."""
        return expose(np.asarray(self.image.reduce(_ZOOM)), self.rng, self.wildness)


def as_color(values: Iterable[float]) -> Color:
    """Round to a color that PIL takes."""
    red, green, blue = (int(min(255, max(0, round(float(v))))) for v in values)
    return red, green, blue


def expose(picture: np.ndarray, rng: Generator, wildness: float) -> np.ndarray:
    """Expose a picture as a camera does: uneven light, lost focus, grain; (32, 32, 3) uint8."""
    pixels = picture.astype(np.float32)
    if rng.random() < 0.3 * wildness:
        padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
        rows = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
        pixels = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 3
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    light = rng.uniform(-0.3, 0.3, 2) * wildness
    pixels = pixels * (
        1 + light[0] * ramp[:, None, None] + light[1] * ramp[None, :, None]
    )
    grain = rng.uniform(2, 4 + 12 * wildness)
    pixels = pixels + grain * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)
