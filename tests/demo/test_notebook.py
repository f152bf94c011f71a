"""The notebook runs from its first cell to its last, and is kept without outputs."""

import json

import datasets
from helpers import REPOSITORY

CELLS = json.loads((REPOSITORY / "examples" / "first_merge.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_BENCH_DIDI_CACHE", str(tmp_path / "suites"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["rows"].keys() == set(names["model"].tasks)
    for own, merged in names["rows"].values():
        assert merged >= own - 0.1
    assert (names["place"] / "models").is_dir()


def test_it_is_kept_without_outputs():
    assert not any(cell["outputs"] or cell["execution_count"] for cell in CODE)
