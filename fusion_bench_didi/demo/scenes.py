"""Pictures of things: traffic signs, faces and clocks. See :mod:`.painters`."""

import numpy as np
from numpy.random import Generator

from .drawing import Canvas, Color, arc, as_color, circle, regular, turned
from .painters import ARROW, NUMBERS, SHAPES

SIGNS = tuple(
    "stop yield no_entry limit_30 limit_50 limit_80 no_passing priority danger "
    "turn_left turn_right ahead parking".split()
)
_RED, _BLUE, _YELLOW = (200, 25, 35), (25, 70, 175), (245, 195, 20)
_WHITE, _BLACK = (240, 240, 240), (20, 20, 20)


def _dimmed(color: Color, rng: Generator, wildness: float) -> Color:
    """A sign's color after years of sun, or at dusk."""
    light = rng.uniform(1 - 0.65 * wildness, 1)
    return as_color(np.array(color) * light + rng.uniform(-25, 25, 3) * wildness)


def paint_sign(rng: Generator, label: int, wildness: float) -> np.ndarray:
    """A traffic sign before a street: sky, wall or leaves, whatever the colors say."""
    canvas = Canvas(rng, wildness, size=0.78, turn=15)
    canvas.clutter()
    red, blue, yellow, white, black = (
        _dimmed(c, rng, wildness) for c in (_RED, _BLUE, _YELLOW, _WHITE, _BLACK)
    )
    name, face = SIGNS[label], "DejaVuSans-Bold"
    if name == "stop":
        canvas.polygon(regular(8, turn=22.5), red)
        canvas.text("STOP", face, height=0.55, fill=white)
    elif name in ("yield", "danger"):
        turn = 90 if name == "yield" else -90
        canvas.polygon(regular(3, turn=turn), red)
        canvas.polygon([(0.6 * x, 0.6 * y) for x, y in regular(3, turn=turn)], white)
        if name == "danger":
            canvas.line([(0, -0.35), (0, 0.25)], 0.18, black)
    elif name == "no_entry":
        canvas.polygon(circle(), red)
        canvas.line([(-0.65, 0), (0.65, 0)], 0.34, white)
    elif name.startswith("limit") or name == "no_passing":
        canvas.polygon(circle(), red)
        canvas.polygon(circle(0.76), white)
        if name == "no_passing":
            canvas.polygon(circle(0.24, (-0.3, 0.1)), red)
            canvas.polygon(circle(0.24, (0.3, 0.1)), black)
        else:
            canvas.text(name[-2:], face, height=0.85, fill=black)
    elif name == "priority":
        canvas.polygon(regular(4), white)
        canvas.polygon([(0.7 * x, 0.7 * y) for x, y in regular(4)], yellow)
    elif name == "parking":
        canvas.polygon(SHAPES["square"], blue)
        canvas.text("P", face, height=1.1, fill=white)
    else:
        canvas.polygon(circle(), blue)
        heading = {"turn_left": 180, "turn_right": 0, "ahead": -90}[name]
        canvas.polygon(turned(ARROW, heading), white)
    return canvas.finish()


FACES = tuple("happy sad neutral surprised angry sleepy winking laughing".split())


def paint_face(rng: Generator, label: int, wildness: float) -> np.ndarray:
    """A mood, on a face whose skin, hair and features are anybody's."""
    canvas = Canvas(rng, wildness, size=0.85, turn=25)
    canvas.clutter()
    name = FACES[label]
    skin = as_color(
        np.array((235, 190, 120)) * rng.uniform(1 - 0.45 * wildness, 1.05, 3)
    )
    dark = as_color(rng.uniform(10, 30 + 50 * wildness, 3))
    canvas.polygon(circle(squash=rng.uniform(1 - 0.15 * wildness, 1)), skin)
    if rng.random() < 0.7 * wildness:  # hair, or a cap
        brim = arc(180 + rng.uniform(0, 30), 360 - rng.uniform(0, 30))
        canvas.polygon(brim, canvas.ink)
    gap, level = rng.uniform(0.34, 0.34 + 0.1 * wildness), -0.15
    for side in (-1, 1):
        x = side * gap
        left, right, top = x - 0.18, x + 0.18, level - 0.1
        if name == "sleepy" or (name == "winking" and side == 1):
            canvas.line([(left, level), (right, level)], 0.1, dark)
        elif name == "laughing":
            below = level + 0.08
            canvas.line([(left, below), (x, top), (right, below)], 0.1, dark)
        else:
            wide = 0.2 if name == "surprised" else 0.13
            canvas.polygon(circle(wide, (x, level)), dark)
        if name == "angry":
            brow = [(x + side * 0.22, level - 0.36), (x - side * 0.2, level - 0.16)]
            canvas.line(brow, 0.12, dark)
    mouth = rng.uniform(0.36 - 0.08 * wildness, 0.42)
    if name in ("happy", "winking"):
        canvas.line(arc(20, 160, mouth, (0, 0.22)), 0.11, dark)
    elif name == "laughing":
        canvas.polygon(arc(0, 180, mouth, (0, 0.2)), dark)
    elif name in ("sad", "angry"):
        canvas.line(arc(205, 335, mouth, (0, 0.72)), 0.11, dark)
    elif name == "surprised":
        canvas.polygon(circle(0.2, (0, 0.48)), dark)
    else:
        canvas.line([(-mouth * 0.8, 0.45), (mouth * 0.8, 0.45)], 0.11, dark)
    return canvas.finish()


HOURS = NUMBERS


def paint_clock(rng: Generator, label: int, wildness: float) -> np.ndarray:
    """A clock on the hour: the short hand says which, the long one points to twelve."""
    canvas = Canvas(rng, wildness, size=0.85, turn=14)
    canvas.clutter()
    face = as_color(np.array(canvas.paper) * 0.75 + np.array(canvas.ink) * 0.25)
    if rng.random() < 0.5:
        canvas.polygon(circle(), canvas.ink)
        canvas.polygon(circle(rng.uniform(0.78, 0.92)), face)
    ink = canvas.ink
    if rng.random() < 0.5 * wildness:
        for hour in range(12):
            canvas.line(turned([(0.72, 0), (0.88, 0)], 30 * hour), 0.07, ink)
    lag = rng.uniform(-6, 6) * wildness
    short = rng.uniform(0.48, 0.56 + 0.04 * wildness)
    canvas.line([(0, 0.1), (0, -0.85)], 0.08, ink)
    hand = turned([(0, 0), (0, -short)], 30 * (label + 1) + lag)
    canvas.line(hand, rng.uniform(0.17, 0.24), ink)
    return canvas.finish()
