"""Directories appear whole or not at all: kills, runs side by side, and what dead runs left."""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from fusion_bench.modelpool import BaseModelPool
from fuzz import in_memory
from fuzz_cases import body
from helpers import family, merge_settings, task_vectors
from saved_directories import TESTS, listing, marked, small

from fusion_bench_didi.checkpoint import directory as directories
from fusion_bench_didi.checkpoint import locks
from fusion_bench_didi.checkpoint.directory import check_target, whole_directory
from fusion_bench_didi.checkpoint.locks import Lock, Scratch, held, is_held
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.merging import pipeline
from fusion_bench_didi.merging.basis_store import BasisStore
from fusion_bench_didi.method.didi import DiDiMerging

# --- kills --------------------------------------------------------------------

SCENARIOS = {
    "save": {"absent"},
    "merge": {"absent"},
    "merge overwrite": {"0.9"},
    # two renames are all that some systems have
    "save overwrite renames": {"0.9", "absent"},
    "router overwrite": {"0.9"},
    "library": {"absent", "some"},
    "row": {"absent"},
    "row overwrite": {"0.9"},
}


@pytest.fixture(scope="module")
def kills() -> dict[str, list[dict]]:
    with tempfile.TemporaryDirectory(dir=in_memory()) as home:
        command = [sys.executable, "-W", "ignore", str(TESTS / "kills.py"), home]
        done = subprocess.run([*command, *SCENARIOS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_leaves_the_old_the_new_or_nothing(kills, scenario):
    found = [outcome["found"] for outcome in kills[scenario]]
    before = SCENARIOS[scenario]
    assert set(found) <= {*before, "0.5"} and found[-1] == "0.5"
    new = found.index("0.5")
    few = scenario.startswith("row")
    assert new > (2 if few else 10) and set(found[new:]) == {"0.5"}, "what is new stays"
    assert found.count("absent") <= 1 or "overwrite" not in scenario


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_next_run_sweeps(kills, scenario):
    left = [outcome["left"] for outcome in kills[scenario]]
    few = scenario.startswith("row")
    assert sum(map(bool, left)) > (0 if few else 10) and left[-1] == []
    assert all(outcome["again"] == ["0.5", "m"] for outcome in kills[scenario])


# --- one run at a time --------------------------------------------------------


def _write_slowly(target: Path, mark: str, started, go, results) -> None:
    """In another process: begin, wait for the sign, end."""
    try:
        with whole_directory(target) as place:
            started.set()
            go.wait(60)
            model = small(mark=mark)
            model.write_config(place, model.write_parts(place))
        results.put((mark, None))
    except (DiDiError, FileExistsError) as error:
        results.put((mark, f"{type(error).__name__}: {error}"))
    finally:
        started.set()


@pytest.mark.parametrize("turn", range(3))
def test_of_two_runs_into_one_target_the_second_fails_at_once(tmp_path, turn):
    """Both ended well, and one result was gone."""
    context = multiprocessing.get_context("fork")
    results, go = context.Queue(), context.Event()
    target, running = tmp_path / "m", []
    for mark in ("first", "second"):
        started = context.Event()
        arguments = (target, mark, started, go, results)
        running.append(context.Process(target=_write_slowly, args=arguments))
        running[-1].start()
        assert started.wait(60)
    assert results.get(timeout=60) == (
        "second",
        f"DiDiError: Another run is writing to {target}. Wait for it, or choose another directory.",
    )
    with pytest.raises(DiDiError, match="Another run is writing"):
        check_target(target)
    with pytest.raises(DiDiError, match="Another run is writing"):
        small().save_pretrained(target)
    go.set()
    assert results.get(timeout=60) == ("first", None)
    for process in running:
        process.join(60)
    assert marked(target) == "first" and listing(tmp_path) == ["m"]


def test_the_lock_is_taken_before_the_merge(tmp_path, monkeypatch):
    """The second run does not find out after hours of work."""
    models = family(body(), ("a", "b"))
    monkeypatch.setattr(pipeline, "scan", lambda *_, **__: pytest.fail("it merges"))
    with held(tmp_path / ".m.lock"), pytest.raises(DiDiError, match="Another run"):
        DiDiMerging(output_dir=str(tmp_path / "m")).run(BaseModelPool(models))
    assert listing(tmp_path) == []


@pytest.mark.parametrize("kind", ["ours", "other", "file", "empty"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_be_meanwhile_is_not_replaced(tmp_path, kind, overwrite):
    """Something that knows of no lock makes the target while a merge runs; nothing of either is lost."""
    target, ours = tmp_path / "m", small(mark="new")
    small(mark="other").save_pretrained(tmp_path / "other")
    fine = overwrite and kind in ("ours", "empty")
    expected = contextlib.nullcontext() if fine else pytest.raises(FileExistsError)
    with expected as caught, whole_directory(target, overwrite=overwrite) as place:
        ours.write_config(place, ours.write_parts(place))
        if kind == "ours":
            os.rename(tmp_path / "other", target)
        elif kind == "file":
            target.write_text("mine")
        else:
            target.mkdir()
            if kind == "other":
                (target / "mine").touch()
    if fine:
        assert marked(target) == "new"
        return
    kept = re.search(r"what was written is in (\S+)\.", str(caught.value))[1]
    assert marked(Path(kept)) == "new"
    if kind == "ours":
        assert marked(target) == "other"
    elif kind == "file":
        assert target.read_text() == "mine"
    else:
        assert listing(target) == (["mine"] if kind == "other" else [])


@pytest.mark.parametrize("movable", [True, False])
def test_a_result_whose_place_cannot_be_had_is_kept(tmp_path, monkeypatch, movable):
    """Whatever the look at the place says: rights, say, which may also keep it from another name."""
    target, ours = tmp_path / "m", small(mark="new")
    with pytest.raises(FileExistsError) as caught:
        with whole_directory(target) as place:
            ours.write_config(place, ours.write_parts(place))
            target.mkdir()
            monkeypatch.setattr(directories, "check_target", fail(DiDiError("rights")))
            if not movable:
                monkeypatch.setattr(directories.os, "rename", fail(OSError("rights")))
    kept = re.search(r"what was written is in (\S+)\. \(rights", str(caught.value))[1]
    assert marked(Path(kept)) == "new" and listing(target) == []


def fail(error: Exception):
    def function(*_, **__):
        raise error

    return function


def test_a_target_that_goes_meanwhile_is_written(tmp_path):
    target, model = tmp_path / "m", small(mark="new")
    small(mark="old").save_pretrained(target)
    with whole_directory(target, overwrite=True) as place:
        model.write_config(place, model.write_parts(place))
        shutil.rmtree(target)
    assert marked(target) == "new"


def test_locks_are_free_again_after_a_failure(tmp_path):
    for error in (KeyboardInterrupt, ValueError, BlockingIOError):
        with pytest.raises(error), whole_directory(tmp_path / "m"):
            assert is_held(tmp_path / ".m.lock")
            raise error
        assert listing(tmp_path) == []
    small(mark="new").save_pretrained(tmp_path / "m")


def test_a_lock_that_its_owner_just_removed_is_made_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it, the owner may end; a lock on a file without a name holds nobody off."""
    path, flock = tmp_path / "l", locks.fcntl.flock
    path.touch()

    def owner_ends(fd: int, how: int) -> None:
        monkeypatch.undo()
        os.unlink(path)
        flock(fd, how)

    monkeypatch.setattr(locks.fcntl, "flock", owner_ends)
    lock = Lock(path)
    assert is_held(path)
    with pytest.raises(BlockingIOError):
        Lock(path)
    lock.release()
    assert not path.exists() and not is_held(path)


def test_file_systems_without_locks(tmp_path, monkeypatch):
    """There two runs are told apart at the end only, and nobody knows what is dead."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    left = tmp_path / ".m.didi-abcdefgh.tmp"
    left.mkdir()
    small(mark="new").save_pretrained(tmp_path / "m")
    assert marked(tmp_path / "m") == "new"
    assert listing(tmp_path) == [".m.didi-abcdefgh.tmp", "m"]


# --- what dead runs left ------------------------------------------------------


def test_only_what_dead_runs_left_of_this_target_is_removed(tmp_path):
    small(mark="old").save_pretrained(tmp_path / "m")
    dead = [".m.didi-abcdefgh.tmp", ".m.didi-0000_000.old"]
    others = [
        *(".m.n.didi-abcdefgh.tmp", ".mm.didi-abcdefgh.tmp", ".m.didi-abc.tmp"),
        *("m.didi-abcdefgh.tmp", ".m.didi-abcdefgh.tmp~", ".m.didi-ABCDEFGH.tmp"),
        *(".m.didi-abcdefgh.bak", ".m.abcdefgh.tmp", ".m.thesis_1.old"),
    ]
    for name in (*dead, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / ".m.didi-12345678.tmp").touch()  # a file is not what we leave
    os.symlink(tmp_path / others[0], tmp_path / ".m.didi-87654321.tmp")
    (tmp_path / ".m.lock").touch()
    small(mark="new").save_pretrained(tmp_path / "m", overwrite=True)
    kept = [*others, ".m.didi-12345678.tmp", ".m.didi-87654321.tmp", "m"]
    assert listing(tmp_path) == sorted(kept) and marked(tmp_path / "m") == "new"


@pytest.mark.parametrize("locks_there", [True, False])
def test_a_file_of_someone_else_is_no_lock_to_remove(
    tmp_path, monkeypatch, locks_there
):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    if not locks_there:
        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    (tmp_path / ".m.lock").write_text("mine")
    small(mark="new").save_pretrained(tmp_path / "m")
    assert (tmp_path / ".m.lock").read_text() == "mine"


def test_what_a_killed_exchange_left_comes_back(tmp_path):
    """Killed between two renames, where there is no exchange."""
    small(mark="old").save_pretrained(tmp_path / "m")
    os.rename(tmp_path / "m", tmp_path / ".m.didi-abcdefgh.old")
    (tmp_path / ".m.didi-abcdefgh.tmp").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        small(mark="new").save_pretrained(tmp_path / "m")
    assert marked(tmp_path / "m") == "old" and listing(tmp_path) == ["m"]


def _holds_scratch(root: Path, started, go) -> None:
    tempfile.tempdir = str(root)
    scratch = Scratch()
    (scratch.path / "0.safetensors").write_bytes(b"0" * 100)
    started.put(scratch.path)
    go.wait(60)
    os.kill(os.getpid(), 9)


def test_scratch_of_dead_runs_is_swept_and_of_live_ones_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context = multiprocessing.get_context("fork")
    started, go = context.Queue(), context.Event()
    process = context.Process(target=_holds_scratch, args=(tmp_path, started, go))
    process.start()
    live = started.get(timeout=60)
    assert (Scratch().path / "..").resolve() == tmp_path
    assert list(live.iterdir()), "its owner lives"
    go.set()
    process.join(60)
    assert list(live.iterdir()), "its owner was killed"
    mine = Scratch()
    assert not live.exists()
    assert listing(tmp_path) == sorted((mine.path.name, f"{mine.path.name}.lock"))
    mine.remove()
    assert listing(tmp_path) == []


def test_what_only_looks_like_scratch_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {
        "results1": "thesis.tex",  # eight letters too
        "abcdefgh": "0.safetensors",  # of a release without locks, still young
        "ijklmnop": "0.safetensors",
        "qrstuvwx": "0.safetensors",
    }
    for name, file in names.items():
        (tmp_path / f"{locks.SCRATCH}{name}").mkdir()
        (tmp_path / f"{locks.SCRATCH}{name}" / file).touch()
        if name != "abcdefgh":
            old = time.time() - 2 * 24 * 3600
            os.utime(tmp_path / f"{locks.SCRATCH}{name}", (old, old))
    (tmp_path / f"{locks.SCRATCH}results1.lock").touch()
    notes = [f"{locks.SCRATCH}{name}.lock" for name in ("notes", "full0000")]
    for name in notes:
        (tmp_path / name).write_text("mine")
    with held(tmp_path / f"{locks.SCRATCH}qrstuvwx.lock"):
        locks.sweep_scratch(tmp_path)
    left = [name for name in names if name != "ijklmnop"]
    left = [f"{locks.SCRATCH}{name}" for name in left]
    assert sorted([*left, *notes]) == listing(tmp_path)


def test_bases_lie_in_scratch_that_goes_with_their_store(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    vectors = task_vectors(family(body(), ("a", "b")))
    kept: list[BasisStore] = []
    make = BasisStore.__init__

    def remember(self, *arguments):
        make(self, *arguments)
        kept.append(self)

    monkeypatch.setattr(BasisStore, "__init__", remember)
    settings = merge_settings(0.9, factor_memory_gb=0.0)
    planned = pipeline.plan(vectors, settings)
    assert len(listing(tmp_path)) == 2, "scratch and its lock"
    del planned
    kept.clear()
    assert listing(tmp_path) == []
