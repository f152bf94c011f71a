"""Every picture of docs/img, drawn anew from the figures beside it: no text on another, nothing cut off."""

import json
import re

import pytest
from figure_boxes import ink_at_the_edge, overlapping
from helpers import REPOSITORY
from matplotlib.figure import Figure

from benchmarks import (
    comparison_page,
    frontier,
    merge_front,
    own_storage_page,
    ranks_and_bits,
    real_suite,
    routing_page,
    wide_page,
)
from fusion_bench_didi.report.style import new_figure, save_figure

IMAGES = REPOSITORY / "docs" / "img"
SUITES = sorted(
    p.stem.removeprefix("comparison_")
    for p in (REPOSITORY / "docs").glob("comparison_*.json")
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def stored(name: str, place: str = "docs"):
    return json.loads((REPOSITORY / place / f"{name}.json").read_text())


def of_frontier() -> Figure:
    suites = stored("frontier")["suites"]
    return frontier.draw({n: suites[n] for n in frontier.TITLES if n in suites})


def of_wide_towers() -> Figure:
    widths = wide_page._widths(stored("wide_towers"))
    return wide_page.draw({w: wide_page.chosen(f["rows"]) for w, f in widths.items()})


#: Picture -> how it is drawn from stored figures.
DRAWN = {
    "frontier": of_frontier,
    "wide_towers": of_wide_towers,
    "own_storage": lambda: own_storage_page.draw(own_storage_page.held(stored("own_storage"))),
    "real8_ranks_and_bits": lambda: ranks_and_bits.draw(stored("ranks_and_bits")["rows"], "real8"),
    "real_suite_real8": lambda: real_suite.draw(stored("real_suite_real8")["rows"], "real8"),
    "confusion_real8": lambda: routing_page.draw(stored("routing_real8", "benchmarks/results")),
    "confusion_demo": lambda: routing_page.draw(stored("routing_demo", "benchmarks/results")),
}  # fmt: skip
#: Pictures of ranks need more than is kept in docs/; tests/report draws them of rows that are made up.
FROM_A_RUN = {"ranks", "energy_kept"}


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_lies_on_another(name):
    assert not overlapping(DRAWN[name]())


def test_no_text_of_the_search_lies_on_another():
    drawn = merge_front.pictures(stored("merge_front"))
    assert set(drawn) == {"merge_front", "merge_hypervolume"}
    assert not [pair for figure in drawn.values() for pair in overlapping(figure)]


@pytest.mark.parametrize("name", [*DRAWN, "merge_front", "merge_hypervolume"])
def test_a_picture_names_its_suite_and_says_a_number(name):
    search = merge_front.pictures(stored("merge_front")) if "merge" in name else {}
    figure = search.get(name) or DRAWN[name]()
    titles = [axes.get_title("left") for axes in figure.axes]
    titles += [figure.get_suptitle()]
    said = " ".join(titles)
    assert re.search("real8|demo", said) and re.search(r"\d", said.replace("real8", ""))


@pytest.mark.parametrize("suite", SUITES)
def test_no_text_of_a_comparison_lies_on_another(suite):
    drawn = comparison_page.pictures(suite)
    assert set(drawn) == set(comparison_page.PICTURES[suite]) - FROM_A_RUN
    assert not [pair for figure in drawn.values() for pair in overlapping(figure)]


def test_no_picture_is_left_out_and_none_in_the_docs_is_cut_off():
    held = {*DRAWN, "merge_front", "merge_hypervolume"}
    for suite in SUITES:
        held |= {f"{suite}_{name}" for name in comparison_page.PICTURES[suite]}
    there = {file.stem: file for file in IMAGES.glob("*.png")}
    assert there.keys() <= held
    assert not [name for name, file in there.items() if ink_at_the_edge(file)]


def test_what_is_wrong_is_found(tmp_path):
    figure = new_figure(2, 2)
    figure.text(0.5, 0.5, "one")
    figure.text(0.52, 0.5, "on another")
    figure.text(-0.1, 0.8, "beyond the edge")
    assert overlapping(figure) == [("one", "on another")]
    figure.savefig(tmp_path / "as_it_is.png")
    assert ink_at_the_edge(tmp_path / "as_it_is.png")
    save_figure(figure, tmp_path / "cut_to_fit.png")
    assert not ink_at_the_edge(tmp_path / "cut_to_fit.png")
