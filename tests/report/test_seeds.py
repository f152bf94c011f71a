"""Comparisons of several seeds as one: means, ranges, and refusals."""

import copy
import csv
import json

import click
import pytest
from commands import run
from helpers import REPOSITORY

from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.report import interactive
from fusion_bench_didi.report.comparison import Comparison
from fusion_bench_didi.report.seeds import over_seeds
from fusion_bench_didi.report.tables import as_csv, as_latex, as_markdown


@pytest.fixture
def three() -> list[Comparison]:
    """Of the language suite, moved by one point in each."""
    data = json.loads((REPOSITORY / "docs" / "comparison_language.json").read_text())
    found = []
    for i in range(3):
        moved = copy.deepcopy(data)
        moved["config"]["seed"] = i
        for row in moved["rows"]:
            if row["average"] is not None:
                row["average"] += 0.01 * i
        found.append(Comparison(moved))
    return found


def test_means_and_ranges(three):
    made = over_seeds(three)
    for row, first in zip(made["rows"], three[0].rows):
        assert row["average"] == pytest.approx(first["average"] + 0.01)
        assert row["over_seeds"] == [first["average"], first["average"] + 0.02]
        assert row["x_excl"] == pytest.approx(first["x_excl"])
    assert made["config"]["seed"] == [0, 1, 2]
    bars = interactive.accuracy_vs_storage(Comparison(made)).data[-1].error_y
    assert bars.array == pytest.approx([1.0] * len(bars.array))


def test_tables_tell_the_ranges_of_several_seeds_only(three):
    for i, comparison in enumerate(three):
        for row in comparison.rows:
            row["retention"]["mean_of_ratios"] = 0.9 + 0.01 * i
    made = Comparison(over_seeds(three))
    row = made.rows[1]
    ends = " to ".join(f"{100 * end:.1f}" for end in row["over_seeds"])
    for make in (as_markdown, as_latex):
        starts = f"| {row['method']} |", f"{row['method']} &"
        (line,) = (x for x in make(made).splitlines() if x.startswith(starts))
        assert ends in line and "90.0 to 92.0" in line
        assert "over seeds" in make(made) and "over seeds" not in make(three[0])
    head, *lines = csv.DictReader(as_csv(made).splitlines())
    assert float(head["retention_over_seeds_largest"]) == pytest.approx(0.92)
    assert "over_seeds" not in as_csv(three[0])


def test_a_method_that_failed_once_failed_and_others_are_refused(three):
    three[1].rows[2]["error"] = "ValueError: no"
    assert over_seeds(three)["rows"][2]["error"] == "ValueError: no"
    three[2].rows.pop()
    with pytest.raises(DiDiError, match="the same tasks and methods"):
        over_seeds(three)


def test_the_command_writes_one_report(three, tmp_path):
    places = [tmp_path / str(i) for i in range(3)]
    for place, comparison in zip(places, three):
        place.mkdir()
        (place / "comparison.json").write_text(json.dumps(comparison.data))
    before = (places[1] / "comparison.json").read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    for taken in (places[1], tmp_path / "run"):
        with pytest.raises(click.UsageError, match="another --out"):
            run("report", *places, "-o", taken)
    assert (places[1] / "comparison.json").read_bytes() == before
    told = run("report", *places, "-o", tmp_path / "all")
    assert "comparison.html" in told
    assert "over seeds" in (tmp_path / "all" / "accuracy_vs_storage.svg").read_text()
    assert "Over seeds" in (tmp_path / "all" / "comparison.html").read_text()
