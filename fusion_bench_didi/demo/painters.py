"""Painters of flat pictures: characters, shapes, textures, counts, colors and arrows.

A painter takes ``(rng, label, wildness)`` and returns a (32, 32, 3) uint8 picture of
the class with that index; see :mod:`.drawing` for what wildness means. The tables
that give an index its name stand beside the painters. Pictures of things, composed of
several figures, are in :mod:`.scenes`.
"""

import math

import numpy as np
from numpy.random import Generator
from PIL import Image

from . import drawing
from .drawing import SIDE, Canvas, Points, arc, as_color, circle, regular, turned

NUMBERS = tuple(
    "one two three four five six seven eight nine ten eleven twelve".split()
)
LETTERS = tuple("abcdefghijklmnop")  # half as hard as the whole alphabet
GREEK = dict(
    zip("gamma delta theta lambda xi pi sigma phi psi omega".split(), "ΓΔΘΛΞΠΣΦΨΩ")
)


def _glyph(
    rng: Generator, text: str, wildness: float, *, size: float = 0.75
) -> np.ndarray:
    """One character, with its neighbors peeping in as on a street sign."""
    canvas = Canvas(rng, wildness, size=size, turn=18)
    canvas.clutter()
    fonts = drawing.BOOK_FONTS if wildness > 0.5 else drawing.PRINT_FONTS
    face = fonts[rng.integers(len(fonts))]
    for side in (-1, 1):
        if rng.random() < 0.4 * wildness:
            neighbor = chr(ord("A") + rng.integers(26))
            canvas.text(neighbor, face, height=1.3, at=(1.6 * side, 0.0))
    canvas.text(text, face, height=1.5)
    return canvas.finish()


def paint_digit(rng: Generator, label: int, wildness: float) -> np.ndarray:
    """A printed digit: the tame relative of the handwritten ones.

    Half of them are seen from afar and white on black, as the handwritten ones are.
    """
    picture = _glyph(rng, str(label), wildness, size=0.95)
    if rng.random() < 0.5:
        gray = Image.fromarray(picture).convert("L").reduce(4)
        near = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        picture = np.repeat(near[..., None], 3, axis=-1)
        if picture[0].mean() > 128:
            picture = 255 - picture
    return picture


def paint_letter(rng: Generator, label: int, wildness: float) -> np.ndarray:
    return _glyph(rng, LETTERS[label].upper(), wildness)


def paint_greek(rng: Generator, label: int, wildness: float) -> np.ndarray:
    """DejaVu only, as the older TeX fonts keep Greek elsewhere."""
    return _glyph(rng, list(GREEK.values())[label], min(wildness, 0.5))


_CRESCENT = [*arc(50, 310), *arc(-65, 65, 0.85, (0.45, 0.0))[::-1]]
_T = np.linspace(0, 2 * np.pi, 32, endpoint=False)
_HEART_Y = 13 * np.cos(_T) - 5 * np.cos(2 * _T) - 2 * np.cos(3 * _T) - np.cos(4 * _T)
_HEART = list(zip((np.sin(_T) ** 3).tolist(), (-_HEART_Y / 16).tolist()))
_CROSS = [
    *((-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3)),
    *((0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3)),
]
SHAPES: dict[str, Points] = {
    "circle": circle(0.95),
    "ellipse": circle(squash=0.55),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "rectangle": [(-1.0, -0.5), (1.0, -0.5), (1.0, 0.5), (-1.0, 0.5)],
    "triangle": regular(3),
    "pentagon": regular(5),
    "hexagon": regular(6),
    "star": regular(5, inner=0.42),
    "cross": _CROSS,
    "crescent": _CRESCENT,
    "heart": _HEART,
}


def paint_shape(rng: Generator, label: int, wildness: float) -> np.ndarray:
    canvas = Canvas(rng, wildness, size=0.75, turn=35)
    canvas.clutter()
    filled = bool(rng.random() > 0.55 * wildness)
    canvas.figure(list(SHAPES.values())[label], filled=filled)
    return canvas.finish()


TEXTURES = tuple(
    "striped checked dotted meshed zigzagged wavy bricked speckled marbled ringed".split()
)


def _weave(rng: Generator, name: str, wildness: float) -> np.ndarray:
    """How much ink each pixel of a texture carries, about -1 to 1; (32, 32)."""
    turn = rng.uniform(-1, 1) * (0.1 + 0.6 * wildness)
    pitch = rng.uniform(5.5 - 1.5 * wildness, 7.5 + 4 * wildness)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) - SIDE / 2
    x, y = x + rng.uniform(-8, 8), y + rng.uniform(-8, 8)
    u = (x * math.cos(turn) - y * math.sin(turn)) / pitch
    v = (x * math.sin(turn) + y * math.cos(turn)) / pitch
    along, across = np.sin(2 * np.pi * u), np.sin(2 * np.pi * v)
    if name == "striped":
        return across
    if name == "checked":
        return np.sign(along * across)
    if name == "dotted":
        return 1.0 - 6.5 * ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2) / 0.75
    if name == "meshed":
        return np.maximum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)) * 8 - 3
    if name == "zigzagged":
        return np.sin(2 * np.pi * (v + 0.8 * np.abs(u / 1.2 % 1 - 0.5)))
    if name == "wavy":
        return np.sin(2 * np.pi * (v + 0.22 * np.sin(2 * np.pi * u / 1.6)))
    if name == "bricked":
        shifted = (u / 1.7 + 0.5 * (np.floor(v) % 2)) % 1
        return np.where((v % 1 < 0.22) | (shifted < 0.13), 1.0, -1.0)
    if name == "ringed":
        return np.sin(2 * np.pi * np.hypot(u, v))
    noise = rng.standard_normal((SIDE, SIDE))
    if name == "speckled":
        return np.sign(noise - 0.8)
    spectrum = np.fft.fft2(noise)  # marbled: the low notes of white noise
    low = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None, :])
    veins = np.fft.ifft2(spectrum * np.exp(-((low * pitch) ** 2) * 3)).real
    return np.sin(2.5 * veins / veins.std())


def paint_texture(rng: Generator, label: int, wildness: float) -> np.ndarray:
    canvas = Canvas(rng, wildness)  # for its colors
    ink = np.clip(_weave(rng, TEXTURES[label], wildness), -1, 1)[..., None] / 2 + 0.5
    picture = np.array(canvas.paper) * (1 - ink) + np.array(canvas.ink) * ink
    return drawing.expose(picture, rng, wildness)


COUNTS = NUMBERS[:6]


def paint_count(rng: Generator, label: int, wildness: float) -> np.ndarray:
    """Some blobs that do not touch; wild ones differ in size, form and color."""
    canvas = Canvas(rng, wildness, size=0.92, turn=40)
    form = (
        list(SHAPES.values())[rng.integers(len(SHAPES))]
        if rng.random() < wildness
        else circle()
    )
    placed: list[tuple[float, float, float]] = []
    while len(placed) <= label:
        x, y = rng.uniform(-0.85, 0.85, 2)
        radius = rng.uniform(0.24 - 0.07 * wildness, 0.24 + 0.08 * wildness)
        if all(math.hypot(x - a, y - b) > radius + r + 0.06 for a, b, r in placed):
            placed.append((x, y, radius))
        elif rng.random() < 0.02:
            placed.clear()  # painted into a corner: start again
    for x, y, radius in placed:
        shade = np.array(canvas.ink) + rng.uniform(-40, 40, 3) * wildness
        canvas.polygon(
            [(x + radius * a, y + radius * b) for a, b in form], as_color(shade)
        )
    return canvas.finish()


COLORS = {
    **{"red": (215, 40, 40), "green": (40, 165, 60), "blue": (45, 75, 205)},
    **{"yellow": (240, 215, 50), "purple": (140, 50, 170), "orange": (245, 140, 30)},
    **{"white": (245, 245, 245), "black": (15, 15, 15), "pink": (245, 150, 190)},
}


def paint_color(rng: Generator, label: int, wildness: float) -> np.ndarray:
    """Any shape in one color: teaches the tower that form is not everything."""
    canvas = Canvas(rng, wildness, turn=180)
    form = list(SHAPES.values())[rng.integers(len(SHAPES))]
    pure = np.array(list(COLORS.values())[label])
    canvas.polygon(form, as_color(pure + rng.uniform(-15, 15, 3)))
    return canvas.finish()


ARROW = [
    *((-0.7, -0.14), (0.1, -0.14), (0.1, -0.5), (0.75, 0.0)),
    *((0.1, 0.5), (0.1, 0.14), (-0.7, 0.14)),
]

HEADINGS = tuple(
    "east southeast south southwest west northwest north northeast".split()
)


def paint_arrow(rng: Generator, label: int, wildness: float) -> np.ndarray:
    canvas = Canvas(rng, wildness, turn=12)
    canvas.clutter()
    canvas.polygon(turned(ARROW, 45 * label))
    return canvas.finish()
