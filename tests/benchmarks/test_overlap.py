"""The page of what tasks have in common."""

import json

from benchmarks import overlap


def test_common_rows_and_columns_are_found_where_there_are_some(monkeypatch, tmp_path):
    monkeypatch.setattr(overlap, "OVERLAPS", (0.9,))
    monkeypatch.setattr(overlap, "ERRORS", (0.2,))
    monkeypatch.setattr("sys.argv", ["overlap", "--out", str(tmp_path)])
    overlap.main()
    rows = json.loads((tmp_path / "overlap.json").read_text())["rows"]
    direction, spaces = rows
    assert direction[:2] == ["direction", 0.9] and spaces[:2] == ["spaces", 0.9]
    for *_, ratio, of_it_shared, _ in rows:
        assert ratio < 0.7 and 0 < of_it_shared < 1
    assert spaces[-1] > 0
