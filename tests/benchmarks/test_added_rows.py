"""Rows that are measured beside those of a page are of the same models, and no failure takes the place of a measured row."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import comparison_page

PAGE = comparison_page.DOCS / "comparison_demo.json"


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A page of its own, and nothing that runs: rows of a run are those of the page, as a test changes them."""
    (tmp_path / PAGE.name).write_text(PAGE.read_text())
    monkeypatch.setattr(comparison_page, "DOCS", tmp_path)
    return tmp_path / PAGE.name


def add(monkeypatch, keys, change=lambda rows: None):
    asked = dict.fromkeys([*comparison_page.REFERENCES, *keys])
    rows = {row["key"]: row for row in json.loads(PAGE.read_text())["rows"]}
    rows = {key: copy.deepcopy(rows[key]) for key in asked}
    for row in rows.values():
        row["seconds"] = 123.0
    change(rows)
    found = SimpleNamespace(data={"rows": list(rows.values())})
    monkeypatch.setattr(comparison_page, "compared", lambda *_: found)
    comparison_page.add("demo", Path("somewhere"), keys)


def seconds(page: Path) -> dict[str, float]:
    return {row["key"]: row["seconds"] for row in json.loads(page.read_text())["rows"]}


def test_others_stay_as_they_are(page, monkeypatch):
    before = seconds(page)
    add(monkeypatch, ["randes"])
    add(monkeypatch, ["emr"])
    assert seconds(page) == before | {"randes": 123.0, "emr": 123.0}
    assert list(seconds(page)) == list(before)


def fails(rows):
    rows["randes"] |= {"error": "OutOfMemoryError", "accuracy": None, "average": None}


def is_missing(rows):
    del rows["randes"]


def others_models(rows):
    first = next(iter(rows["individuals"]["accuracy"]))
    rows["individuals"]["accuracy"][first] += 0.01


@pytest.mark.parametrize(
    "keys, change, told",
    [
        (["randes"], fails, "randes failed, so the page stays"),
        (["emr", "randes"], is_missing, "randes failed"),
        (["randes"], others_models, "Individual.* has other accuracies"),
        (["individuals"], others_models, "Individual.* has other accuracies"),
    ],
)
def test_a_page_stays_as_it_is_where_a_row_is_none_of_it(
    page, monkeypatch, keys, change, told
):
    before = page.read_bytes()
    with pytest.raises(ValueError, match=told):
        add(monkeypatch, keys, change)
    assert page.read_bytes() == before
