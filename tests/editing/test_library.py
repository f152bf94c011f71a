"""Laws of libraries: a task comes back as it was put in, and nothing of another is read for it."""

import copy
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import run
from helpers import BASE, didi, floats, normal, same_bits
from shared_forms import base, model_of, values
from torch import nn
from tucker_models import linears

from fusion_bench_didi.checkpoint.deltas import write_manifest
from fusion_bench_didi.deltas.plain import DenseDelta, OwnDelta
from fusion_bench_didi.editing import AdapterLibrary, combine, library, load_tasks
from fusion_bench_didi.errors import (
    CheckpointMismatchError,
    DiDiError,
    UnknownTaskError,
)
from fusion_bench_didi.models.dynamic import DynamicModel


def spoil(place):
    """Whatever is read of it is an error."""
    for file in place.iterdir():
        file.write_bytes(b"nothing")


def test_tasks_of_many_merges_come_back_as_they_were(tmp_path):
    library = AdapterLibrary(tmp_path / "library")
    models = [
        model_of(form, 50 * i, tasks)
        for i, (form, tasks) in enumerate(
            {"dense": "abc", "bases": "def", "low rank": "ghi", "none": "jkl"}.items()
        )
    ]
    expected = {t: v for model in models for t, v in values(model).items()}
    models[1].save_pretrained(tmp_path / "saved")
    library.add(models[0])
    library.add(tmp_path / "saved")
    library.add(combine(models[2], models[3]).model)
    assert library.tasks == sorted(expected)
    assert len([*(tmp_path / "library" / "shared").iterdir()]) >= 3
    for asked in ([t] for t in expected), (["l", "a", "e", "g", "b"], [*expected]):
        for tasks in asked:
            model = library.load(tasks, base())
            assert model.tasks == tasks
            assert all(same_bits(v, expected[t]) for t, v in values(model).items())
    # one alone takes what it takes
    one = library.load("d", base()).storage
    assert one.excl_bits == one.shared_bits + library.bits("d")


def test_what_notebooks_show_of_it_is_a_line(tmp_path):
    both = combine(model_of("dense", 0, "ab"), model_of("dense", 50, "c"))
    library = AdapterLibrary(tmp_path / "library")
    library.add(both.model)
    assert repr(library) == f"AdapterLibrary('{tmp_path / 'library'}') of 3 tasks"
    told = repr(both)
    assert told.startswith("<Edited: combine; ") and "of keeping all 3 models" in told
    assert len(told.splitlines()) == 1 and len(told) < 200
    assert repr(both.after).startswith("<StorageReport: ")


def test_one_task_is_read_without_the_others(tmp_path):
    models = linears()
    model = didi(models, budget=0.1, shared="subspaces", factor_dtype="int4")
    expected = values(model)
    library = AdapterLibrary(tmp_path / "library")
    library.add(model)
    for task in "0124567":
        spoil(tmp_path / "library" / "tasks" / task)
    assert "3" in library and library.tasks == [*"01234567"]
    found = library.load("3", copy.deepcopy(models[BASE]))
    assert same_bits(floats(found.materialize("3")), expected["3"])
    with pytest.raises(CheckpointMismatchError):
        library.load("4", copy.deepcopy(models[BASE]))
    # so it is in the directory of a merged model, where one file holds all
    model.save_pretrained(tmp_path / "whole")
    some = load_tasks(tmp_path / "whole", ["5", "2"], copy.deepcopy(models[BASE]))
    assert some.tasks == ["5", "2"]
    assert all(same_bits(v, expected[t]) for t, v in values(some).items())
    with pytest.raises(UnknownTaskError, match="'no'.*'0', '1'"):
        load_tasks(tmp_path / "whole", ["no"], copy.deepcopy(models[BASE]))


def test_many_adapters_and_names_of_all_kinds(tmp_path):
    names = [f"task {i}" for i in range(40)] + ["a/b", "..", "ä.b", "100%", "A", "a"]
    names.remove("..")
    experts = {
        name: {"0.weight": DenseDelta((6, 6), normal(6, 6, seed=i))}
        for i, name in enumerate(names)
    }
    model = DynamicModel(base(), {}, experts, unit_bits=36 * 32)
    library = AdapterLibrary(tmp_path / "library")
    assert library.tasks == [] and library.add(model) == names
    again = AdapterLibrary(tmp_path / "library")
    assert again.tasks == sorted(names)
    for name in names[-8:]:
        found = again.load(name, base())
        assert same_bits(
            floats(found.materialize(name)), floats(model.materialize(name))
        )
    assert not (tmp_path / "library" / "shared").exists()


def test_tasks_go_with_what_only_they_shared(tmp_path):
    library = AdapterLibrary(tmp_path)
    library.add(model_of("dense", 0, "abc"))
    library.add(model_of("bases", 9, "xyz"), ["x", "y"])
    assert library.tasks == [*"abcxy"]
    library.remove("x")
    assert len([*(tmp_path / "shared").glob("[!.]*")]) == 2
    library.remove("y")
    assert library.tasks == [*"abc"]
    assert len([*(tmp_path / "shared").glob("[!.]*")]) == 1
    with pytest.raises(UnknownTaskError, match="'x'"):
        library.remove("x")


def test_a_task_that_is_replaced_goes_with_what_only_it_shared(tmp_path):
    library = AdapterLibrary(tmp_path)
    library.add(model_of("dense", 0, "abc"))
    library.add(model_of("bases", 9, "xyz"), ["x"])
    for count, tasks in ((3, "a"), (3, "b"), (2, "c")):
        library.add(model_of("low rank", 50, "abc"), tasks, overwrite=True)
        assert len([*(tmp_path / "shared").glob("[!.]*")]) == count
    assert library.load([*"abcx"], base()).tasks == [*"abcx"]


@pytest.mark.parametrize("way", ["add", "load", "load_tasks"])
def test_one_name_stands_for_itself_and_none_for_nothing(way, tmp_path):
    experts = {name: {"1.bias": OwnDelta((3,), normal(3))} for name in ("svhn", "s")}
    model = DynamicModel(base(), {}, experts, unit_bits=32)
    library = AdapterLibrary(tmp_path / "library")
    library.add(model)
    model.save_pretrained(tmp_path / "saved")

    def tasks(asked):
        if way == "add":
            return library.add(model, asked, overwrite=True)
        if way == "load":
            return library.load(asked, base()).tasks
        return load_tasks(tmp_path / "saved", asked, base()).tasks

    assert tasks("svhn") == ["svhn"] and tasks(("s", "s")) == ["s"]
    with pytest.raises(DiDiError, match="No task is asked for"):
        tasks([])


def test_a_model_whose_tasks_are_taken_keeps_the_one_that_is_set(tmp_path):
    model = model_of("dense", 0, "abc")
    model.set_task("b")
    alone = floats(model.backbone)
    library = AdapterLibrary(tmp_path)
    library.add(model)
    assert same_bits(floats(model.backbone), alone)
    assert library.load("a", base()).tasks == ["a"]


def test_what_tasks_share_is_looked_at_once(tmp_path, monkeypatch):
    looked, digests = [], library.digests
    monkeypatch.setattr(library, "digests", lambda t: looked.append(t) or digests(t))
    model = model_of("dense", 0, "abcdef")
    AdapterLibrary(tmp_path).add(model)
    assert len(looked) == len(model.shared) > 0


def _bytes_that_are_no_name(tasks, written):
    shutil.copytree(written, Path(os.fsdecode(os.fsencode(tasks) + b"/\xff")))


#: what lies in a library that is none of it: made in (its tasks, its shared parts, a task of its own)
STRANGERS = {
    "a file among tasks": lambda tasks, shared, written: (tasks / "Thumbs.db").touch(),
    "a directory among tasks": lambda tasks, *_: (tasks / "lost+found").mkdir(),
    "a name of no characters": lambda tasks, shared, written: shutil.copytree(
        written, tasks / "%ff%fe"
    ),
    "a name of no bytes": lambda tasks, shared, written: _bytes_that_are_no_name(
        tasks, written
    ),
    "a way out": lambda tasks, shared, written: shutil.copytree(
        written, tasks / "%2e%2e"
    ),
    "a file among parts": lambda tasks, shared, written: (shared / "README").touch(),
    "a directory among parts": lambda tasks, shared, written: (shared / "m").mkdir(),
    "a model among parts": lambda tasks, shared, written: shutil.copytree(
        written, shared / "m"
    ),
    "a link among parts": lambda tasks, shared, written: (
        shared / ("0" * 64)
    ).symlink_to(written),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_what_else_lies_in_it_is_no_task_and_stays(what, tmp_path):
    library = AdapterLibrary(tmp_path)
    library.add(model_of("dense", 0, "ab"))
    library.add(model_of("dense", 9, "c"))
    tasks, shared = tmp_path / "tasks", tmp_path / "shared"
    before = {*tmp_path.glob("*/*")}
    STRANGERS[what](tasks, shared, tasks / "a")
    strange = {*tmp_path.glob("*/*")} - before
    assert len(strange) == 1
    assert AdapterLibrary(tmp_path).tasks == [*"abc"]
    library.add(model_of("dense", 50, "b"), overwrite=True)
    library.remove("a")
    assert library.tasks == ["b", "c"]
    assert library.load(["b", "c"], base()).tasks == ["b", "c"]
    library.remove("b")
    library.remove("c")
    assert {p for p in tmp_path.glob("*/[!.]*")} == strange


@pytest.mark.parametrize("change", ["remove", "add"])
def test_a_task_that_cannot_be_read_is_named_before_anything_is_changed(
    change, tmp_path
):
    """Nobody knows what it shares."""
    library = AdapterLibrary(tmp_path)
    library.add(model_of("dense", 0, "abc"))
    file = tmp_path / "tasks" / "c" / "config.json"
    file.write_text(file.read_text().replace("unit_bits", "unit_bytes"))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointMismatchError, match="c/config.json"):
        if change == "remove":
            library.remove("a")
        else:
            library.add(model_of("dense", 9, "a"), overwrite=True)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert before == after
    library.add(model_of("dense", 0, "abc"), "c", overwrite=True)
    library.remove("a")
    assert library.tasks == ["b", "c"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [("parents", 5), ("tensors", []), ("labels", {"1": "x"}), ("generation", "x")],
)
def test_facts_of_a_task_are_as_they_are_written(kind, told, tmp_path):
    library = AdapterLibrary(tmp_path)
    library.add(model_of("dense", 0, "ab"))
    file = tmp_path / "tasks" / "a" / "config.json"
    config = json.loads(file.read_text())
    del config["checksum"]
    write_manifest(file, {**config, "info": {kind: told}})
    with pytest.raises(CheckpointMismatchError, match=rf"config.json: info.{kind}"):
        library.load("a", base())
    assert library.load("b", base()).tasks == ["b"]


def test_a_file_is_no_library(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointMismatchError, match="library.json cannot be read"):
        AdapterLibrary(tmp_path / "file")


def test_one_that_another_process_begins_is_none_yet(tmp_path):
    """Or one that was killed while it began."""
    (tmp_path / "library.json.tmp").write_text("{")
    library = AdapterLibrary(tmp_path)
    assert library.tasks == []
    library.add(model_of("dense", 0, "a"))
    assert AdapterLibrary(tmp_path).tasks == ["a"]


def test_those_who_add_and_remove_at_once_take_turns(tmp_path):
    """What tasks share is there for whoever uses it, whoever was faster."""
    shares = model_of("bases", 9, "xyz")
    shares.save_pretrained(tmp_path / "saved")
    place = tmp_path / "library"
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            done = [
                pool.submit(
                    lambda t=t: AdapterLibrary(place).add(tmp_path / "saved", t)
                )
                for t in "xyz"
            ]
            assert sorted(one.result()[0] for one in done) == [*"xyz"]
        library = AdapterLibrary(place)
        library.remove("x")
        with ThreadPoolExecutor(3) as pool:
            done = [
                pool.submit(library.remove, "y"),
                pool.submit(library.add, tmp_path / "saved", "x"),
                pool.submit(library.remove, "z"),
            ]
            [one.result() for one in done]
        assert library.tasks == ["x"] and library.load("x", base()).tasks == ["x"]
        library.remove("x")


def test_what_does_not_belong_is_refused_before_anything_is_written(tmp_path):
    library, model = AdapterLibrary(tmp_path / "library"), model_of("dense", 0, "abc")
    library.add(model, ["a"])
    with pytest.raises(FileExistsError, match="'a' already"):
        library.add(model)
    assert library.tasks == ["a"]
    library.add(model, overwrite=True)
    with pytest.raises(UnknownTaskError, match="'q'"):
        library.add(model, ["q"])
    other = model_of("dense", 0, "xyz")
    with torch.no_grad():
        other.backbone[0].weight += 1
    with pytest.raises(CheckpointMismatchError, match="one base model"):
        library.add(other)
    with pytest.raises(CheckpointMismatchError, match="not the one"):
        library.load("a", other.backbone)
    with pytest.raises(UnknownTaskError, match="'x'"):
        library.load(["a", "x"], base())
    with pytest.raises(DiDiError, match="No task"):
        library.load([], base())
    hidden = DynamicModel(base(), {}, {".a": {}, "b": {}}, unit_bits=32)
    with pytest.raises(DiDiError, match="no name"):
        library.add(hidden)
    assert library.tasks == [*"abc"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    with pytest.raises(CheckpointMismatchError, match="library.json"):
        AdapterLibrary(tmp_path / "elsewhere")
    with pytest.raises(DiDiError, match="cannot be edited"):
        library.add(nn.Linear(2, 2))


def test_a_task_of_it_has_no_page_of_a_model(tmp_path):
    AdapterLibrary(tmp_path).add(model_of("dense", 0, "a"))
    with pytest.raises(CheckpointMismatchError, match="config.json: backbone is miss"):
        run("inspect", tmp_path / "tasks" / "a")
