"""What changes under a comparison, or between two runs of it: no two rows are of different models, or on different files."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import demo_pools
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from fusion_bench_didi.demo.suite import build_suite
from fusion_bench_didi.programs import compare as program
from fusion_bench_didi.programs.compare import ComparisonProgram, FailedRowsError
from fusion_bench_didi.programs.entries import ComparisonError
from fusion_bench_didi.programs.scoring import Scorer

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:CLIPDataset:DeprecationWarning"
)
ENTRIES = {
    "individuals": {"method": "individuals", "group": "reference"},
    "averaging": {"method": "simple_average", "group": "static"},
    "emr": {"method": "didi/emr", "group": "dynamic"},
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("suite")
    build_suite(cache, size="tiny")
    return cache


@pytest.fixture
def cache(suite, tmp_path) -> Path:
    return Path(shutil.copytree(suite, tmp_path / "suite"))


def compare(cache: Path, directory: Path, **changes) -> dict:
    sides = demo_pools(cache)
    log = {"path": {"log_dir": str(directory)}, "seed": 0, "report": False}
    config = {"entries": copy.deepcopy(ENTRIES), **sides, **log, **changes}
    try:
        found = ComparisonProgram(**OmegaConf.create(config)).run()
    except FailedRowsError as error:
        found = error.comparison
    return {row["key"]: row for row in found["rows"]}


def weights(cache: Path, model: str = "digits") -> Path:
    return next(cache.glob(f"*/vision/{model}/model.safetensors"))


def other_values(file: Path) -> None:
    tensors = {n: v + 0.01 if v.is_floating_point() else v for n, v in load_file(file).items()}  # fmt: skip
    save_file(tensors, file, metadata={"format": "pt"})


def one_more(file: Path) -> None:
    tensors = {**load_file(file), "extra": torch.ones(3)}
    save_file(tensors, file, metadata={"format": "pt"})


def cut_short(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])


CHANGES = [other_values, one_more, cut_short, Path.unlink]


@pytest.mark.parametrize(
    "at, model, change",
    [
        *(("averaging", "_pretrained_", change) for change in CHANGES),
        ("individuals", "digits", other_values),
        ("emr", "digits", other_values),
        ("emr", "digits", Path.unlink),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_a_change_under_a_run_ends_its_rows(
    cache, tmp_path, monkeypatch, change, at, model
):
    stock = program.run_entry

    def run_entry(bench, entry, rows, watch):
        if entry.key == at:
            change(weights(cache, model))
        return stock(bench, entry, rows, watch)

    monkeypatch.setattr(program, "run_entry", run_entry)
    rows = compare(cache, tmp_path / "run", report=at == "individuals")
    before, after = list(ENTRIES)[: (k := list(ENTRIES).index(at))], list(ENTRIES)[k:]
    assert all(rows[key]["error"] is None for key in before)
    for key in after:
        assert str(weights(cache, "shapes").parents[1] / model) in rows[key]["error"]
        assert rows[key]["average"] is None
    assert (tmp_path / "run/comparison.html").is_file() == (at == "individuals")


def test_a_change_between_two_tasks_keeps_what_was_found(cache, tmp_path, monkeypatch):
    stock, calls = Scorer.scores, []

    def scores(self, model, task):
        found = stock(self, model, task)
        calls.append(task)
        if len(calls) == 2:
            other_values(weights(cache))
        return found

    monkeypatch.setattr(Scorer, "scores", scores)
    rows = compare(cache, tmp_path / "run")
    assert all("changed while it was read" in row["error"] for row in rows.values())
    assert [v is None for v in rows["individuals"]["accuracy"].values()] == [False, True, True]  # fmt: skip


@pytest.mark.parametrize("model", ["digits", "_pretrained_"])
def test_a_change_between_two_runs_is_refused(cache, tmp_path, model):
    file = weights(cache, model)
    content, first = file.read_bytes(), compare(cache, tmp_path / "run", only=["individuals"])  # fmt: skip
    other_values(file)
    named = r"checkpoints of .*model\.safetensors: '[0-9a-f]{64}' -> '[0-9a-f]{64}'"
    with pytest.raises(ComparisonError, match=named):
        compare(cache, tmp_path / "run")
    second = compare(cache, tmp_path / "run", restart=True, only=["individuals"])
    if model == "digits":
        assert second["individuals"]["loss"] != first["individuals"]["loss"]
    file.write_bytes(content)  # of another date, with the old values
    with pytest.raises(ComparisonError, match=named):
        compare(cache, tmp_path / "run")


def test_files_written_anew_with_the_same_content_are_the_same_models(cache, tmp_path):
    compare(cache, tmp_path / "run", only=["individuals"])
    for model in ("digits", "_pretrained_"):
        file = weights(cache, model)
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    assert not any(row["error"] for row in compare(cache, tmp_path / "run").values())


def test_a_run_of_before_checksums_goes_on(cache, tmp_path):
    compare(cache, tmp_path / "run", only=["individuals"])
    for name in ("models.json", "data.json"):
        (tmp_path / "run" / name).unlink()
    assert not any(row["error"] for row in compare(cache, tmp_path / "run").values())
    assert len(json.loads((tmp_path / "run/models.json").read_text())) > 3


def test_all_rows_are_evaluated_on_the_same_files(cache, tmp_path):
    (file,) = cache.glob("*/data/digits/test-*.parquet")
    compare(cache, tmp_path / "run", only=["individuals"])
    content = file.read_bytes()
    file.write_bytes(content + b"\n")
    named = rf"files of digits\.{file.name}: '[0-9a-f]+' -> '[0-9a-f]+'\n.*restart"
    with pytest.raises(ComparisonError, match=named):
        compare(cache, tmp_path / "run")
    file.write_bytes(content)
    assert not any(row["error"] for row in compare(cache, tmp_path / "run").values())


@pytest.mark.parametrize("name", ["comparison.json", "models.json", "data.json"])
def test_a_directory_in_the_place_of_a_file(cache, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ComparisonError, match=f"{name} is no file"):
        compare(cache, tmp_path / "run")


def test_rows_that_were_cleared_away_meanwhile(cache, tmp_path, monkeypatch):
    stock = program.run_entry

    def run_entry(bench, entry, rows, watch):
        if entry.key == "emr":
            shutil.rmtree(bench.store.rows)
        return stock(bench, entry, rows, watch)

    monkeypatch.setattr(program, "run_entry", run_entry)
    rows = compare(cache, tmp_path / "run")
    assert not any(row["error"] for row in rows.values())
