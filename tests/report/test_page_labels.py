"""Labels of the page's points cover neither one another nor leave the plot, however wide a screen is."""

import json

import numpy as np
import pytest
from helpers import REPOSITORY

from fusion_bench_didi.report import findings, interactive, page_labels
from fusion_bench_didi.report.comparison import Comparison
from fusion_bench_didi.report.page_labels import HEIGHT, LEAST, MOST, PIXELS
from fusion_bench_didi.report.style import look, new_figure

SUITES = ["demo", "real8", "language"]


def comparison_of(suite: str) -> Comparison:
    return Comparison.read(REPOSITORY / "docs" / f"comparison_{suite}.json")


def sides(text: str) -> np.ndarray:
    """Of a label on a screen, in pixels."""
    bold = text.startswith("<b>")
    with look():
        figure = new_figure(4, 1)
        figure.set_dpi(72)
        text = text.removeprefix("<b>").removesuffix("</b>")
        drawn = figure.text(0, 0, text, fontsize=PIXELS, fontweight="bold" if bold else "normal")  # fmt: skip
        box = drawn.get_window_extent(figure.canvas.get_renderer())
    return np.array([box.width, box.height])


@pytest.mark.parametrize("suite", SUITES)
def test_labels_of_points_never_meet(suite):
    layout = interactive.accuracy_vs_storage(comparison_of(suite)).layout
    named = layout.annotations
    (left, right), (low, high) = layout.xaxis.range, layout.yaxis.range
    size = np.array([sides(a.text) for a in named])
    assert len(named) >= 8
    for width in np.linspace(LEAST, MOST, 12):
        x = [(a.x - left) / (right - left) * width + a.ax for a in named]
        y = [(a.y - low) / (high - low) * HEIGHT - a.ay for a in named]
        center = np.stack([x, y], axis=1)  # (N, 2)
        apart = np.abs(center[:, None] - center)  # (N, N, 2)
        common = ((size[:, None] + size) / 2 - apart > 1.5).all(-1)
        assert not np.triu(common, 1).any()
        assert (center - size / 2 > -2).all()
        assert (center + size / 2 < (width + 2, HEIGHT + 2)).all()


def test_a_label_that_another_would_cover_in_some_width_is_left_out():
    """Of two points that drift apart under labels that look at each other; what is bold stays."""
    places, boxes = np.array([[100.0, 50], [200, 50]]), np.array(
        [[150.0, 45, 190, 55], [100, 45, 140, 55]]
    )
    assert page_labels._ever_meet(places, boxes)
    assert not page_labels._ever_meet(places, boxes + [[0, 0, 0, 0], [0, 90, 0, 90]])


def test_a_figure_says_what_it_shows_and_of_which_suite():
    data = json.loads((REPOSITORY / "docs" / "comparison_real8.json").read_text())
    ours = [row for row in data["rows"] if row["family"] == "DiDi"]
    kept = [r for r in ours if r["retention"]["mean_of_ratios"] >= findings.KEPT]
    least = min(kept, key=lambda row: row["x_excl"])
    share, size = 100 * least["retention"]["mean_of_ratios"], f"{least['x_excl']:.2f}"
    told = findings.of_storage(Comparison(data))
    assert told.startswith(f"real8: DiDi keeps {share:.1f} % of 8 ") and size in told
    for row in ours:  # a finding is of the rows
        if row["x_excl"] < least["x_excl"] + 0.1:
            row["retention"]["mean_of_ratios"] = 0.5
    assert size not in findings.of_storage(Comparison(data))
    task = data["tasks"][3]
    for row in data["rows"]:
        if row["family"] == "DiDi":
            row["accuracy"][task] -= 0.3
    assert findings.of_tasks(Comparison(data)).endswith(f"model, on {task}")
