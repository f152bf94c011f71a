"""README and docs say what was measured: text is made from the figures beside it, and the figures are of this code."""

import json

import pytest
from helpers import REPOSITORY

from benchmarks import (
    comparison_page,
    expectations,
    figures,
    gpu,
    merge_front,
    own_storage_page,
    what_we_learned,
)

ROOT = REPOSITORY
COMPARISONS = sorted(p.stem for p in (ROOT / "docs").glob("comparison_*.json"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_readme_shows_the_figures_beside_it():
    text = comparison_page.README.read_text()
    assert comparison_page.readme(text) == text, "run `make figures`, or comparison_page --pages"  # fmt: skip
    rows = json.loads((ROOT / "docs" / "comparison_real8.json").read_text())["rows"]
    (row,) = [row for row in rows if row["method"] == "DiDi 0.24"]
    assert f"| {row['x_excl']:.2f} | {100 * row['average']:.1f} |" in text


@pytest.mark.parametrize("name", COMPARISONS)
def test_page_shows_the_figures_beside_it(name):
    suite = name.removeprefix("comparison_")
    assert (ROOT / "docs" / f"{name}.md").read_text() == comparison_page.page(suite)


def test_the_search_shows_the_figures_beside_it():
    record = json.loads((ROOT / "docs" / "merge_front.json").read_text())
    assert (ROOT / "docs" / "merge_front.md").read_text() == merge_front.page(record)


def test_a_point_that_cites_a_row_that_was_not_run_is_left_out():
    note = "- one {average[A]}\n  more\n- two {average[B]}\n  more\n\nrest\n"
    found = comparison_page.without_points_of(["B"], note, {"average": {"A": 1}})
    assert found == "- one {average[A]}\n  more\n\nrest\n"
    with pytest.raises(KeyError):
        comparison_page.without_points_of([], note, {"average": {"A": 1}})


def test_rivals_at_their_own_storage_show_the_figures_beside_them():
    record = json.loads(own_storage_page.FILE.read_text())
    assert own_storage_page.PAGE.read_text() == own_storage_page.page(record)


def test_the_accelerator_shows_the_figures_beside_it():
    record = json.loads((ROOT / "docs" / "gpu.json").read_text())
    assert (ROOT / "docs" / "gpu.md").read_text() == gpu.page(record)


def test_what_was_learned_shows_the_figures_of_the_other_pages():
    found = (ROOT / "docs" / "what_we_learned.md").read_text()
    assert found == what_we_learned.page(), "run benchmarks.what_we_learned"
    assert "no budget" not in found and "{" not in found


@pytest.mark.parametrize(
    "suite", json.loads((ROOT / "docs" / "expectations.json").read_text())["suites"]
)
def test_compared_models_are_those_that_are_expected(suite):
    """The comparison was made with code that loses what the stored expectation says that it loses."""
    expected = json.loads(expectations.FILE.read_text())["suites"][suite]
    rows = json.loads((ROOT / "docs" / f"comparison_{suite}.json").read_text())["rows"]
    errors = {
        row["method"]: row["relative_error"] for row in rows if "relative_error" in row
    }
    compared = {
        "DiDi 0.24": "0.24",
        "DiDi 0.5": "0.5",
        "DiDi 1.0": "1.0",
        "DiDi-M 1.4": "1.4",
    }
    for method, budget in compared.items():
        assert errors[method] == pytest.approx(expected[budget]["error"], rel=0.01)


def test_worse_is_noticed_and_noise_is_not():
    expected = {str(b): {"error": 0.1, "retention": 97.0} for b in range(10)}

    def with_change(error=0.0, points=0.0, only=None):
        return {
            b: {
                "error": row["error"] * (1 + error * (only in (None, b))),
                "retention": row["retention"] - points * (only in (None, b)),
            }
            for b, row in expected.items()
        }

    def faults(**change):
        return list(expectations.faults(with_change(**change), expected))

    assert not faults()
    assert not faults(error=0.002, points=0.1)
    assert not faults(points=1.0, only="3")
    assert faults(error=0.01, only="3")
    assert faults(points=2.0, only="3")
    assert faults(points=0.5)
    assert not faults(error=-0.5, points=-2.0), "better is not worse"
    assert list(expectations.faults({}, expected))


def test_every_page_with_figures_has_a_command():
    """A page that `make figures` does not make would grow old."""
    by_hand = {"published", "architecture", "export", "index", "tutorial"}
    by_hand |= {"configuration", "storage", "reference"}
    by_hand |= {"gpu", "wide_towers"}  # by commands that need an accelerator
    by_hand.add("serving_export")  # by examples/serve, which needs servers
    by_hand.add("transformers")  # by make test-transformers5, whose environment differs
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages - by_hand <= set(figures.PAGES)
