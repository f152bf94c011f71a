"""Files of a report are whole: what fails on the way leaves what was there."""

import errno
import os
import resource
import signal

import pytest
from matplotlib.figure import Figure
from report.test_report import synthetic

from fusion_bench_didi import files
from fusion_bench_didi.checkpoint.directory import write_json
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.files import write_whole
from fusion_bench_didi.recombination.front import plot_front
from fusion_bench_didi.recombination.objectives import Evaluation
from fusion_bench_didi.report import Comparison, page, tables, write_report
from fusion_bench_didi.report.style import save_figure

ONE = Evaluation([[[0], [0]]], 0.5, 1.5, {"a": 0.4})
WRITERS = {
    "json": lambda d: write_json(d / "a.json", {"a": list(range(2000))}),
    "tables": lambda d: tables.write(Comparison(synthetic()), d),
    "page": lambda d: page.write(Comparison(synthetic()), d),
    "png": lambda d: save_figure(Figure(), d / "a.png"),
    "front": lambda d: plot_front([ONE], d),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("fault", ["flush", "rename"])
def test_what_fails_leaves_what_was_there(tmp_path, monkeypatch, name, fault):
    monkeypatch.setattr(page, "_svgs", lambda *_: {})  # slow to draw
    WRITERS[name](tmp_path)
    there = list(tmp_path.iterdir())
    assert there
    for file in there:
        file.write_text("old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"flush": (files, "sync"), "rename": (files.os, "replace")}[fault]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](tmp_path)
    assert sorted(there) == sorted(tmp_path.iterdir())
    assert {file.read_text() for file in there} == {"old"}


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """A limit of the file's size, which the system holds as it does a disk's."""
    (tmp_path / "a").write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_whole(tmp_path / "a", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"rows": []}', "\xff", "[" * 10**5]
)
def test_what_is_no_comparison_has_no_report(tmp_path, text):
    if text is not None:
        (tmp_path / "comparison.json").write_text(text, encoding="latin-1")
    with pytest.raises(DiDiError, match="comparison.json is no comparison"):
        write_report(tmp_path)
