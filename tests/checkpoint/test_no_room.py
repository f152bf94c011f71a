"""Targets that cannot be written: a full disk, names that no system has; what was there stays, and nothing is left."""

import os
import resource
import signal
from contextlib import contextmanager

import pytest
from fusion_bench.modelpool import BaseModelPool
from fuzz_cases import body, every_form
from helpers import family
from saved_directories import small

from fusion_bench_didi.artifacts import load_artifact, save_artifact
from fusion_bench_didi.checkpoint.directory import check_target
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.recombination.library import ModularExpert, save_modules


@contextmanager
def full_disk(size: int):
    """Files may not grow beyond a size, which the system holds as it does a disk's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def save(target, overwrite):
    small().save_pretrained(target, overwrite=overwrite)


def merge(target, overwrite):
    method = DiDiMerging(output_dir=str(target), overwrite=overwrite)
    method.run(BaseModelPool(family(body(), ("a", "b"))))


def static(target, overwrite):
    types = {name: p.dtype for name, p in body().named_parameters()}
    save_artifact(body(), target, base=body(), types=types, overwrite=overwrite)


@pytest.mark.parametrize("write", [save, merge, static])
@pytest.mark.parametrize("size", [10, 1000], ids=["first file", "tensors"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path, write, overwrite, size):
    """The library's error named no file, and the system's was a traceback."""
    if overwrite:
        small(mark="old").save_pretrained(tmp_path / "m")
    before = os.listdir(tmp_path)
    with full_disk(size), pytest.raises(DiDiError, match="(?s)too large.* make room"):
        write(tmp_path / "m", overwrite)
    left = set(os.listdir(tmp_path)) - set(before)
    assert left == ({".m.journal"} if write is merge else set())
    if overwrite:
        assert load_artifact(tmp_path / "m", body()).info["mark"] == "old"
    write(tmp_path / "m", overwrite)  # no lock is left either
    assert os.listdir(tmp_path) == ["m"]


def test_a_full_disk_leaves_no_half_of_a_module(tmp_path):
    shared, _ = every_form()
    module = ModularExpert("all-1", "all", ("a",), "average", shared, {})
    with full_disk(1000), pytest.raises(DiDiError, match="all-1 cannot be written"):
        save_modules(tmp_path, [module])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 256, "ö" * 128, "a\0b", "x" * 300 + "/m"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_no_system_has_are_refused_at_once(tmp_path, name, overwrite):
    """The merge was saved under another name, hours later."""
    with pytest.raises(DiDiError, match="cannot be made"):
        check_target(tmp_path / name, overwrite=overwrite)
    with pytest.raises(DiDiError, match="cannot be made"):
        merge(tmp_path / name, overwrite)
    assert os.listdir(tmp_path) == []
