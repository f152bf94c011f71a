"""Rows of a comparison on disk: of one run at a time, as they were written, and nothing else's."""

import json
import math
import os
import random
import shutil

import pytest
from fuzz_cases import body, every_form

from fusion_bench_didi.checkpoint.directory import alone, write_json
from fusion_bench_didi.checkpoint.fields import CHECKSUM, sealed
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.files import MARK
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.programs.compare import ComparisonProgram
from fusion_bench_didi.programs.entries import ComparisonError, Entry
from fusion_bench_didi.programs.results import blank_row
from fusion_bench_didi.programs.rows import RowStore

SETTINGS = {"format": 1, "seed": 0, "versions": {"fusion-bench-didi": "1"}}
ROW = {
    **blank_row(Entry("emr", "EMR", "emr", "dynamic"), {"method": "emr"}),
    **{"accuracy": {"mnist": 0.75}, "complete": True, "x_excl": 1.5, "notes": ["n"]},
}


@pytest.fixture
def store(tmp_path):
    store = RowStore(tmp_path, SETTINGS)
    store.save("emr", ROW)
    return store


@pytest.mark.parametrize(
    "change, told",
    [
        ({"fast_dev_run": True}, "fast_dev_run: False -> True"),
        ({"precision": "bf16-mixed"}, "precision: '32-true' -> 'bf16-mixed'"),
        ({"taskpool": {"fast_dev_run": True}}, "taskpool.fast_dev_run: None -> True"),
    ],
)
def test_settings_of_before_a_key_are_those_of_its_default(tmp_path, change, told):
    pool = "fusion_bench.taskpool.LMEvalHarnessTaskPool"
    before = {**SETTINGS, "taskpool": {"_target_": pool, "fast_dev_run": False}}
    now = {**SETTINGS, "fast_dev_run": False, "precision": "32-true"}
    pool = "fusion_bench_didi.taskpool.lm_eval_harness.lm_eval_pool"
    now["taskpool"] = {"_target_": pool, "fast_dev_run": None}
    RowStore(tmp_path, before).save("emr", ROW)
    assert RowStore(tmp_path, now).load("emr") == ROW
    with pytest.raises(ComparisonError, match=told):
        RowStore(tmp_path, {**now, **change})


def write_json_in(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, value)


@pytest.mark.parametrize("budget", [None, 1.25, math.inf])
def test_a_row_comes_back_as_it_was(store, budget):
    row = {**ROW, "budget": budget, "relative_error": math.inf}
    store.save("emr", row)
    assert store.load("emr") == row and store.load("ties") is None
    RowStore(store.directory, SETTINGS)


@pytest.mark.parametrize("before", ["relocated", "as it was"])
def test_a_run_that_was_moved_goes_on(tmp_path, monkeypatch, before):
    monkeypatch.chdir(tmp_path)
    there, here = tmp_path / "there", tmp_path / "here"
    store = RowStore("there", SETTINGS)  # a relative one is the same place
    entry = {"method": {"directory": str(there / "searches/merge"), "seeds": [0, 1]}}
    if before == "as it was":  # rows written with whole paths
        monkeypatch.setattr(RowStore, "_movable", lambda self, value: value)
    store.save("emr", {**ROW, "entry": entry})
    monkeypatch.undo()
    RowStore(there, SETTINGS).check("emr", entry)
    if before == "as it was":
        return
    there.rename(here)
    moved = {"method": {"directory": str(here / "searches/merge"), "seeds": [0, 1]}}
    RowStore(here, SETTINGS).check("emr", moved)
    for other in ("searches/other", "../elsewhere", ""):
        wrong = {"method": {"directory": str(here / other), "seeds": [0, 1]}}
        with pytest.raises(ComparisonError, match="directory"):
            RowStore(here, SETTINGS).check("emr", wrong)


@pytest.mark.parametrize("name", ["rows/emr.json", "settings.json"])
def test_no_flipped_bit_is_read_as_another_figure(store, name):
    file, rng = store.directory / name, random.Random(0)
    content = file.read_bytes()
    for _ in range(500):
        altered = bytearray(content)
        altered[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(altered)
        try:
            found = RowStore(store.directory, SETTINGS).load("emr")
        except ComparisonError:
            continue
        assert {key: found[key] for key in ROW} == ROW
        file.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": {"mnist": "high"}},
        {"accuracy": {}},
        {"accuracy": [0.5]},
        {"loss": {"mnist": "low"}},
        {"x_excl": "1.5"},
        {"x_incl": True},
        {"bytes_excl": [1]},
        {"budget": {}},
        {"seconds": "fast"},
        {"notes": "n"},
        {"notes": [1]},
        {"error": 1},
        {"complete": 1},
        {"entry": {}},
        {"entry": None},
        {"key": 5},
        {"key": "../emr"},
        {"x_excl": None},
    ],
    ids=str,
)
def test_fields_that_are_none_are_named(store, change):
    """They were raw errors at the end of the run, or wrong figures."""
    write_json(store._file("emr"), sealed({**ROW, **change}))
    (name,) = change
    with pytest.raises(ComparisonError, match=rf"emr.json: {name}.*Remove it"):
        store.load("emr")


@pytest.mark.parametrize("field", [k for k in ROW if k != "loss"])
def test_fields_that_are_gone_are_named(store, field):
    write_json(store._file("emr"), sealed({k: v for k, v in ROW.items() if k != field}))
    with pytest.raises(ComparisonError, match=f"{field} is missing"):
        store.load("emr")


def test_rows_of_before_have_no_losses(store):
    older = {k: v for k, v in ROW.items() if k != "loss"}
    write_json(store._file("emr"), sealed(older))
    assert store.load("emr") == older


@pytest.mark.parametrize("text", ["{", "[]", "", "{}", "\0" * 99, '{"a": 1, "a": 2}'])
def test_a_damaged_row_is_named(store, text):
    store._file("emr").write_text(text)
    with pytest.raises(ComparisonError, match="rows/emr.json .* made anew"):
        store.load("emr")
    (store.directory / "settings.json").write_text(text)
    with pytest.raises(ComparisonError, match="settings.json|seed: None -> 0"):
        RowStore(store.directory, SETTINGS)


def test_rows_written_before_there_were_checksums_go_on(store):
    for file in (store._file("emr"), store.directory / "settings.json"):
        content = json.loads(file.read_text())
        del content[CHECKSUM]
        write_json(file, content)
    assert RowStore(store.directory, SETTINGS).load("emr") == ROW


def test_two_runs_do_not_share_a_directory(tmp_path):
    """They wrote to one temporary file, of which half a row came."""
    program = object.__new__(ComparisonProgram)
    program.dry_run = False
    program.directory = tmp_path / "run"
    with alone(tmp_path / "run" / "settings.json"):
        with pytest.raises(DiDiError, match="Another run is writing to .*run. Wait"):
            program.run()


@pytest.mark.parametrize("parent", ["file", "missing/../file"])
def test_a_place_that_cannot_be_one_is_named(tmp_path, parent):
    (tmp_path / "file").touch()
    program = object.__new__(ComparisonProgram)
    program.dry_run = False
    program.directory = tmp_path / parent / "run"
    with pytest.raises(DiDiError, match="cannot be locked"):
        program.run()


def test_forgetting_removes_what_runs_left_only(store):
    home = store.directory
    DiDiModel(body(), *every_form(), unit_bits=10000).save_pretrained(
        home / "artifacts" / "emr"
    )
    write_json_in(home / "searches" / "merge" / "search.json", {})
    (home / "rows" / "ties.json.tmp").touch()
    mine = [
        home / "artifacts" / "mine" / "config.json",
        home / "searches" / "notes.txt",
        home / "rows" / "notes.txt",
        home / "rows" / "table.json",
        home / "rows" / "package.json.lock",
        home / "config.yaml",
    ]
    for file in mine:
        write_json_in(file, {})
    outside = home.with_name("outside")
    shutil.copytree(home / "artifacts" / "emr", outside)
    os.symlink(outside, home / "artifacts" / "linked")
    write_json_in(outside / "search.json", {})
    os.symlink(outside, home / "searches" / "linked")
    RowStore(home, {**SETTINGS, "seed": 1}, restart=True)
    files = {p for p in home.rglob("*") if p.is_file()}
    assert files == {*mine, home / "settings.json"}
    assert len(list(outside.iterdir())) > 2


@pytest.mark.parametrize("content", [{"theme": "dark"}, {"format": 1}, []])
def test_settings_of_something_else_are_left_alone(tmp_path, content):
    """An editor's, say."""
    file = tmp_path / "settings.json"
    write_json(file, content)
    write_json_in(tmp_path / "rows" / "x.json", {"theme": "dark"})
    before = file.read_text()
    for restart in (False, True):
        with pytest.raises(ComparisonError, match="settings.json|another config"):
            RowStore(tmp_path, SETTINGS, restart=restart)
    assert file.read_text() == before and (tmp_path / "rows" / "x.json").exists()


def test_rows_without_settings_are_refused(store):
    (store.directory / "settings.json").unlink()
    with pytest.raises(ComparisonError, match="settings.json is missing"):
        RowStore(store.directory, SETTINGS)
    RowStore(store.directory, SETTINGS, restart=True)


@pytest.mark.parametrize("left", [None, "rows/emr.json", "searches/emr", "comparison.json"])  # fmt: skip
def test_a_run_that_ended_before_its_first_row_binds_nobody(tmp_path, left):
    ours = {"format": 1, "versions": {MARK: "0"}, "pool": "a"}
    store = RowStore(tmp_path, ours)
    if left == "rows/emr.json":
        store.save("emr", ROW)
    elif left is not None:
        write_json_in(tmp_path / left / "x.json" if "." not in left else tmp_path / left, {})  # fmt: skip
    other = {**ours, "pool": "b"}
    if left is None:
        RowStore(tmp_path, other)
        RowStore(tmp_path, other).save("emr", ROW)
        with pytest.raises(ComparisonError, match="another configuration"):
            RowStore(tmp_path, ours)
    else:
        with pytest.raises(ComparisonError, match="another configuration"):
            RowStore(tmp_path, other)


def test_a_comparison_of_something_else_is_left_alone(tmp_path):
    write_json(tmp_path / "comparison.json", {"phones": []})
    with pytest.raises(ComparisonError, match="may be of something else"):
        RowStore(tmp_path, SETTINGS)


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop"])
@pytest.mark.parametrize("name", ["rows/emr.json", "settings.json"])
def test_what_is_no_file_is_named(store, name, kind):
    file = store.directory / name
    file.unlink()
    make = {"directory": os.mkdir, "pipe": os.mkfifo}
    make.get(kind, lambda path: os.symlink(path.name, path))(file)
    with pytest.raises(ComparisonError, match=f"{name} is damaged"):
        RowStore(store.directory, SETTINGS).load("emr")
