"""The language suite: texts are split by file, and what is kept of log-perplexity is told as it is."""

import zlib

import pytest

from benchmarks import comparison_page, language_texts
from benchmarks.language_page import Known, kept
from benchmarks.language_texts import PARTS, Domain, write_texts


def test_texts_are_split_by_name_and_come_out_again(tmp_path, monkeypatch):
    pieces = {f"file{i}": f"text {i}\n" for i in range(200)}
    drawn = Domain(lambda: iter([*pieces.items(), ("empty", " \n")]), "full", "")
    monkeypatch.setitem(language_texts.DOMAINS, "drawn", drawn)
    monkeypatch.setattr(language_texts, "TRAIN", 500)
    place = write_texts("drawn", tmp_path / "drawn")
    held = {t for n, t in pieces.items() if zlib.crc32(n.encode()) % PARTS == 0}
    found = {
        name: {line + "\n" for line in (place / name).read_text().splitlines() if line}
        for name in ("train.txt", "held_out.txt")
    }
    assert found["held_out.txt"] == held
    assert found["train.txt"] < set(pieces.values()) - held
    assert 500 <= sum(map(len, found["train.txt"])) < 520
    again = write_texts("drawn", tmp_path / "again")
    assert (again / "train.txt").read_text() == (place / "train.txt").read_text()


@pytest.mark.parametrize("domain", ["python", "bytecode"])
def test_what_every_machine_has_is_enough(domain):
    pieces = language_texts.DOMAINS[domain].pieces()
    for _, text in zip(range(5), pieces):
        assert 0 < len(text) <= language_texts.EXCERPT


def test_share_of_the_fall_that_is_kept():
    base, own = {"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 1.5}
    assert kept(base, base, own) == 0 and kept(own, base, own) == 1
    assert kept({"a": 2.5, "b": 1.5}, base, own) == pytest.approx(0.75)
    assert kept({"a": 4.0, "b": 1.5}, base, own) == 0


def test_rows_that_were_not_made_are_dashes():
    shown = "{kept[DiDi]} {kept[none]} {kept[none][german]}"
    assert shown.format(kept=Known({"DiDi": "99.0"})) == "99.0 – –"


def test_rows_of_the_page_are_named_once():
    rows = comparison_page.LANGUAGE_ROWS
    assert len(set(rows)) == len(rows)
    line = comparison_page.command("language", comparison_page.DOCS)
    assert f"only=[{','.join(rows)}]" in line and "save_artifacts=true" not in line
