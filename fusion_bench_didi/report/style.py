"""One look for all plots: grey, blue, green, orange and vermilion (Okabe and Ito's, safe for color-blind readers), and a
marker each."""

import contextlib
import io
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import write_whole

#: kind -> (color, matplotlib marker, plotly symbol, label)
KINDS = {
    "reference": ("#222222", "X", "x", "reference"),
    "static": ("#8a8a8a", "s", "square", "static"),
    "dynamic": ("#0072b2", "D", "diamond", "dynamic"),
    "routed": ("#009e73", "P", "cross", "routed by itself"),
    "variant": ("#e69f00", "^", "triangle-up", "DiDi, variant"),
    "ours": ("#d55e00", "o", "circle", "DiDi (ours)"),
}
ATTENTION, MLP, OTHER = "#0072b2", "#d55e00", "#8a8a8a"
#: perceptually even, from white; readable in grey too
RANK_COLORS = "YlGnBu"

_LOOK = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "didi",  # the same picture gives the same file
}


@contextlib.contextmanager
def look() -> Iterator[None]:
    """Plots made inside have our look, and need no display."""
    matplotlib.use("Agg", force=False)
    with matplotlib.rc_context(_LOOK):
        yield


def color(kind: str) -> str:
    return KINDS[kind][0]


def new_figure(width: float, height: float) -> Figure:
    """An empty picture that can be measured and saved, and that no global list holds; sides in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def title(axes: Axes, text: str, **options: Any) -> None:
    """A title in as many lines as the picture is narrow."""
    letters = int(10.7 * axes.figure.get_figwidth() * axes.get_position().width)
    axes.set_title(textwrap.fill(text, max(letters, 30)), **options)


def headline(figure: Figure, text: str, **options: Any) -> None:
    """Title of a picture of several panels, above all of them."""
    look = {"x": 0.01, "ha": "left", "fontsize": 11, "fontweight": "bold"}
    figure.suptitle(text, **look, **options)


def drawn(figure: Figure, form: str) -> bytes:
    """A picture as the content of a file, cut to what is drawn; the same picture gives the same content."""
    out = io.BytesIO()
    dated = {"metadata": {"Date": None}} if form == "svg" else {}
    with look():
        figure.savefig(out, format=form, **dated)
    return out.getvalue()


def save_figure(figure: Figure, file: Path) -> None:
    """A picture in the format of its file's ending."""
    write_whole(file, drawn(figure, file.suffix.removeprefix(".")))
