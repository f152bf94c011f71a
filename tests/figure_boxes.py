"""What is wrong with a picture: texts that lie on one another, and ink at its edge."""

from pathlib import Path
from unittest import mock

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

#: Pixels that boxes of texts may have in common: they are taller than their letters.
SLACK = 2.0


def drawn_texts(figure: Figure) -> list[Text]:
    """Texts that a picture shows; ticks outside of its axes have some that it does not."""
    drawn: dict[int, Text] = {}
    plain = Text.draw

    def draw(text: Text, renderer, *args, **kwargs):
        drawn[id(text)] = text
        return plain(text, renderer, *args, **kwargs)

    with mock.patch.object(Text, "draw", draw):
        figure.canvas.draw()
    return [t for t in drawn.values() if t.get_visible() and t.get_text().strip()]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes have more than ``SLACK`` pixels in common, both ways."""
    texts = drawn_texts(figure)
    renderer = figure.canvas.get_renderer()
    boxes = np.array([t.get_window_extent(renderer).extents for t in texts])  # (N, 4)
    low = np.maximum(boxes[:, None, :2], boxes[:, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    common = ((high - low) > SLACK).all(-1)  # (N, N)
    pairs = np.argwhere(np.triu(common, 1))
    return [(texts[i].get_text(), texts[j].get_text()) for i, j in pairs]


def ink_at_the_edge(png: Path) -> bool:
    """Whether the outermost pixels are not all white: something was cut off."""
    pixels: NDArray = np.asarray(Image.open(png).convert("L"))
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    return any((edge < 250).any() for edge in edges)
