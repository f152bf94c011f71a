"""A merge that was cut off goes on: to the bytes of an unbroken one, without doing again what is finished, and only if it is the same."""

import gc
import json
import os
import signal
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from helpers import didi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from saved_directories import small
from test_golden import clip, decaying, layers, within_spaces

from benchmarks.processes import on_ranks
from fusion_bench_didi.allocation.curves import PerTaskCurve
from fusion_bench_didi.checkpoint import directory
from fusion_bench_didi.checkpoint import records as checkpoint_records
from fusion_bench_didi.checkpoint.fields import CHECKSUM, sealed
from fusion_bench_didi.checkpoint.journal import (
    Journal,
    Line,
    left_if_worth,
    open_journal,
    read_lines,
)
from fusion_bench_didi.checkpoint.journal_files import HEAD, note_whole, remove
from fusion_bench_didi.checkpoint.records import Records
from fusion_bench_didi.errors import (
    DiDiError,
    NonFiniteError,
    ResumeError,
    SettingsError,
)
from fusion_bench_didi.files import MARK
from fusion_bench_didi.method import TSVCompression
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.task_vectors.watched import Watched

#: Merges by what is special about their way to be decided.
CASES = {
    "default": lambda **to: didi(clip(), budget=0.6, factor_dtype="auto", **to),
    "subspaces": lambda **to: didi(
        layers(within_spaces), budget=0.02, factor_dtype="auto", **to
    ),
    "spilled": lambda **to: didi(
        layers(decaying), budget=0.12, factor_memory_gb=1e-6, **to
    ),
    "baseline": lambda **to: TSVCompression(**to).run(BaseModelPool(clip())),
}


class Cut(Exception):
    pass


def cut_after(monkeypatch, count: int) -> Counter:
    """Lines of a journal by stage, of which only so many can be written."""
    begun: Counter = Counter()
    done, begin = Journal.done, Journal.begin

    def noted(self, stage, name):
        begun[stage.split()[0], name] += 1
        begin(self, stage, name)

    def cut(self, *args, **kwargs):
        if sum(begun.values()) > count:
            raise Cut
        done(self, *args, **kwargs)

    monkeypatch.setattr(Journal, "begin", noted)
    monkeypatch.setattr(Journal, "done", cut)
    return begun


def lines_of(journal: Path) -> dict[tuple[str, str], Line]:
    """What counts of a journal."""
    head = json.loads((journal / HEAD).read_text())
    return read_lines(journal, head[CHECKSUM])


def weights(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}


@pytest.mark.parametrize("case", CASES)
def test_goes_on_to_the_same_bytes(tmp_path, monkeypatch, case):
    with monkeypatch.context() as patch:
        begun = cut_after(patch, 10**6)
        CASES[case](output_dir=str(tmp_path / "whole"))
    steps = sum(begun.values())
    goal = weights(tmp_path / "whole")
    target, journal = tmp_path / "cut", tmp_path / ".cut.journal"
    seen, cuts = Counter(), 0
    while not target.exists():
        with monkeypatch.context() as patch:
            begun = cut_after(patch, max(int(0.3 * steps), 1))
            try:
                CASES[case](output_dir=str(target))
            except Cut:
                assert journal.is_dir() and not target.exists()
                cuts += 1
        seen += begun
    assert cuts > 2
    assert weights(target) == goal
    assert [p.name for p in tmp_path.iterdir() if p.name[0] == "."] == []
    # of every run at most the tensor that it was at is done twice
    assert sum(seen.values()) - len(seen) <= cuts


@pytest.fixture(scope="module")
def goal(tmp_path_factory) -> dict[str, bytes]:
    """What an unbroken merge writes."""
    place = tmp_path_factory.mktemp("whole") / "whole"
    CASES["default"](output_dir=str(place))
    return weights(place)


def test_goes_on_with_other_processes(tmp_path, monkeypatch, goal):
    case = CASES["default"]
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 50)
        case(output_dir=str(tmp_path / "cut"))
    lines = lines_of(tmp_path / ".cut.journal")
    assert {stage.split()[0] for stage, _ in lines} >= {"scan", "decompose"}

    def again(_: int):
        with monkeypatch.context() as patch:
            begun = cut_after(patch, 10**6)
            case(output_dir=str(tmp_path / "cut"))
            return list(begun)

    first, second = on_ranks(2, again)
    finished = {(stage.split()[0], name) for stage, name in lines}
    assert first and second
    assert not finished & {*first, *second}, "nothing is done again"
    assert weights(tmp_path / "cut") == goal


@pytest.mark.parametrize("events", [85, 130])
def test_a_kill_is_a_cut_like_any_other(tmp_path, monkeypatch, goal, events):
    case, left = CASES["default"], [events]
    write = Journal._write

    def killing(self, told):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, told)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write", killing)
        (found,) = on_ranks(1, lambda _: case(output_dir=str(tmp_path / "cut")))
    assert found is None and not (tmp_path / "cut").exists()
    case(output_dir=str(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == goal
    assert [p.name for p in tmp_path.iterdir()] == ["cut"]


# --- what is not the same merge ----------------------------------------------------


@pytest.fixture
def cut(tmp_path, monkeypatch, tiny_clip_dir):
    """A merge of files that was cut off, as a function of other settings."""

    def run(home=tmp_path / "in", swapped=(), **settings):
        places = {name: Path(home) / name for name in NAMES}
        models = {name: str(places[name]) for name in NAMES}
        models |= dict(zip(swapped, [models[name] for name in reversed(swapped)]))
        pool = CLIPVisionModelPool(models)
        usual = {"budget": 0.6, "refine_sweeps": 2, "output_dir": str(tmp_path / "out")}
        return DiDiMerging(**{**usual, **settings}).run(pool)

    from fusion_bench.modelpool import CLIPVisionModelPool

    NAMES = [p.name for p in tiny_clip_dir.iterdir()]
    for file in tiny_clip_dir.rglob("*.*"):
        copy = tmp_path / "in" / file.relative_to(tiny_clip_dir)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 50)
        run()
    return run


def test_a_changed_setting_is_named(cut, tmp_path):
    with pytest.raises(ResumeError, match=r"  budget: 0\.5, was 0\.6"):
        cut(budget=0.5)
    with pytest.raises(ResumeError, match='resume="fresh"'):
        cut(vectors="shared")
    cut(budget=0.5, resume="fresh")
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["info"]["budget"] == 0.5
    )


def test_a_changed_input_is_named(cut, tmp_path):
    file = tmp_path / "in" / "svhn" / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda n: tensors[n].numel())
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ResumeError, match="svhn.*model.safetensors: .*was"):
        cut()
    assert cut(resume="fresh").tasks


def test_an_input_that_was_dated_back_is_named(cut, tmp_path):
    file = tmp_path / "in" / "svhn" / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    save_file({n: -v for n, v in tensors.items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(ResumeError, match="svhn.*model.safetensors: .*was"):
        cut()


def test_settings_that_change_nothing_may_change(cut):
    assert cut(factor_memory_gb=0.0, task_aliases={"x": "svhn"}).tasks


def test_damaged_findings_are_made_again(cut, tmp_path):
    journal = tmp_path / ".out.journal"
    for file in journal.glob("*.jsonl"):
        file.write_bytes(file.read_bytes()[:-7])  # cut off within a line
    for file in journal.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    cut()
    assert not journal.exists()
    cut(output_dir=str(tmp_path / "unbroken"))
    assert weights(tmp_path / "out") == weights(tmp_path / "unbroken")


@pytest.mark.parametrize("case", ["default", "subspaces", "spilled"])
def test_damaged_bases_are_made_again(tmp_path, monkeypatch, case):
    """As after a crash of the system, which leaves zeros in a file of the right size."""
    with monkeypatch.context() as patch:
        begun = cut_after(patch, 10**6)
        CASES[case](output_dir=str(tmp_path / "whole"))
    steps = [stage for stage, _ in begun]
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 1 + max(i for i, s in enumerate(steps) if s == "decompose"))
        CASES[case](output_dir=str(tmp_path / "cut"))
    lines = lines_of(tmp_path / ".cut.journal").values()
    bases = {name for line in lines for name, _ in line.facts.get("bases", ())}
    assert bases
    for name in bases:
        file = tmp_path / ".cut.journal" / name
        half = file.stat().st_size // 2
        file.write_bytes(file.read_bytes()[:-half] + bytes(half))
    CASES[case](output_dir=str(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_lies_in_the_place_of_a_journal_is_named(tmp_path, kind):
    place = tmp_path / ".out.journal"
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "gone")
    for resume in ("continue", "fresh"):
        with pytest.raises(
            ResumeError, match="journal.* is no directory.*Move it away"
        ):
            didi(clip(), output_dir=str(tmp_path / "out"), resume=resume)
    assert os.path.lexists(place)


@pytest.mark.parametrize("how", ["damaged", "a directory"])
def test_a_journal_whose_head_cannot_be_read_is_not_thrown_away(cut, tmp_path, how):
    head = tmp_path / ".out.journal" / "journal.json"

    def rest() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in head.parent.iterdir() if p != head}

    before = rest()
    head.unlink()
    if how == "damaged":
        head.write_text("{")
    else:
        head.mkdir()
    with pytest.raises(ResumeError, match='journal.json .*cannot be read.*"fresh"'):
        cut()
    assert before and rest() == before


@pytest.mark.parametrize("how", ["relative", "through a link", "moved"])
def test_where_inputs_lie_is_not_what_they_are(cut, tmp_path, monkeypatch, how):
    """Their directory is another place's name for the same files."""
    home: Path = tmp_path / "other"
    if how == "relative":
        monkeypatch.chdir(tmp_path)
        home = Path("in")
    elif how == "through a link":
        home.symlink_to(tmp_path / "in")
    else:
        os.rename(tmp_path / "in", home)
    assert cut(home=home).tasks


def test_inputs_that_changed_places_are_named(tmp_path, monkeypatch, request):
    """Were they of one size and written at one moment."""
    monkeypatch.setattr(Watched, "_stamp", lambda *_: (0, 0, 1, 2, 3))
    cut = request.getfixturevalue("cut")
    with pytest.raises(ResumeError, match="mnist, svhn/model.safetensors: .*not there"):
        cut(swapped=("svhn", "mnist"))


# --- what is not as it was written --------------------------------------------------

OF = {f"version of {MARK}": "1", "method": "x"}


@pytest.fixture
def begun(tmp_path) -> Path:
    """A journal of two findings."""
    return journal_at(tmp_path / "out")


def journal_at(place: Path, **of: str) -> Path:
    journal = open_journal(place, {**OF, **of})
    for i in range(2):
        journal.begin("scan 1", f"layers.{i}")
        journal.done("scan 1", f"layers.{i}", content=b"abc", facts={"size": i})
    journal.close()
    return journal.path


def flips(content: bytes):
    for i, byte in enumerate(content):
        yield content[:i] + bytes([byte ^ 1 << i % 8]) + content[i + 1 :]


def test_no_line_counts_of_which_a_bit_flipped(begun):
    """One in a tensor's name or in the facts gave a model of other weights."""
    (file,) = begun.glob("*.jsonl")
    whole, line = lines_of(begun), file.read_bytes().splitlines()[-1]
    assert len(whole) == 2
    for content in flips(line):
        file.write_bytes(content)
        assert lines_of(begun).items() <= whole.items()


def test_no_head_counts_of_which_a_bit_flipped(begun, tmp_path):
    head, whole = begun / HEAD, lines_of(begun)
    content = head.read_bytes()
    for damaged in flips(content):
        head.write_bytes(damaged)
        try:
            journal = open_journal(tmp_path / "out", OF)
        except ResumeError:
            continue
        journal.close()
        assert lines_of(begun) == whole and json.loads(damaged) == json.loads(content)


def test_lines_of_another_merge_do_not_count(begun, tmp_path):
    """As where one directory was copied over another."""
    other, before = journal_at(tmp_path / "other", method="y"), lines_of(begun)
    for file in other.glob("*.jsonl"):
        text = file.read_text().replace("layers.0", "layers.7")
        (begun / f"f{file.name}").write_text(text)
        (begun / f"e{file.name}").write_bytes(file.read_bytes())
    assert lines_of(other) and lines_of(begun) == before


LINES = {
    "a word": '"done"',
    "a number": "1" * 5000,
    "a list": "[1]",
    "nested": "[" * 200_000,
    "no text": "\0\ufffd",
    "no checksum": '{"done": ["encode", "w"], "sha256": "", "facts": {}}',
    **{
        name: json.dumps(sealed({"sha256": "", "facts": {}, "of": "OF", **told}))
        for name, told in {
            "stage a list": {"done": [["x"], "w"]},
            "stages alone": {"done": {"a": 1}},
            "content a number": {"done": ["encode", "w"], "content": 3},
            "file a list": {"done": ["encode", "w"], "file": [1]},
        }.items()
    },
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_strange_line_counts_as_not_written(begun, line):
    before = lines_of(begun)
    told = json.loads((begun / HEAD).read_text())[CHECKSUM]
    if '"OF"' in line:
        line = json.dumps(sealed({**json.loads(line), "of": told}))
    (begun / "abc.0.jsonl").write_text(line + "\n")
    assert lines_of(begun) == before


@pytest.mark.parametrize("ending", ["jsonl", "000001.safetensors"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "gone", "zero", "itself"])
def test_what_is_no_file_counts_as_not_written(begun, tmp_path, kind, ending):
    before, place = lines_of(begun), begun / f"abc.0.{ending}"
    if kind == "directory":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to({"gone": "/gone", "zero": "/dev/zero"}.get(kind, place))
    assert lines_of(begun) == before
    assert not Line(digest="0" * 64, file=place).whole()
    open_journal(tmp_path / "out", OF, fresh=True).close()
    assert not os.path.lexists(place) and not lines_of(begun)


# --- what is someone else's ----------------------------------------------------------


@pytest.mark.parametrize("resume", ["continue", "fresh"])
@pytest.mark.parametrize("what", ["a file", "a file in a journal", "another's journal"])
def test_a_directory_of_someone_else_is_named_and_stays(
    tmp_path, monkeypatch, resume, what
):
    """Before any work."""
    place, name = tmp_path / ".out.journal", "thesis.tex"
    if what == "another's journal":
        name = HEAD
    if what == "a file in a journal":
        journal_at(tmp_path / "out")
    place.mkdir(exist_ok=True)
    (place / name).write_text('{"mine": 1}')
    before = sorted(place.iterdir())
    monkeypatch.setattr(DiDiMerging, "opened", None)
    with pytest.raises(ResumeError, match=f"holds {name}, .*Move it away"):
        didi(clip(), output_dir=str(tmp_path / "out"), resume=resume)
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("what", ["a file", "a file in a journal"])
def test_saving_removes_files_of_a_journal_alone(tmp_path, what):
    place = tmp_path / ".out.journal"
    if what == "a file in a journal":
        journal_at(tmp_path / "out")
    place.mkdir(exist_ok=True)
    (place / "thesis.tex").write_text("mine")
    (place / "notes").mkdir()
    (place / "notes" / "1.0.jsonl").touch()
    small().save_pretrained(tmp_path / "out")
    assert {p.name for p in place.iterdir()} == {"thesis.tex", "notes"}
    assert (place / "notes" / "1.0.jsonl").exists()


def test_a_journal_says_what_it_is_until_it_is_gone(begun, monkeypatch):
    """Killed while it is removed, it is one that is not needed any more."""
    gone, unlink = [], Path.unlink
    note_whole(begun, begun / HEAD)
    (begun / ".tmpAb1234").touch()  # of a tensor that was being written
    monkeypatch.setattr(
        Path, "unlink", lambda p, **kw: gone.append(p.name) or unlink(p, **kw)
    )
    remove(begun)
    assert gone[-2:] == ["whole", HEAD] and len(gone) == 4 and not begun.exists()


def test_a_journal_without_a_head_is_not_thrown_away(begun, tmp_path):
    (begun / HEAD).unlink()
    with pytest.raises(ResumeError, match='cannot be read.*resume="fresh"'):
        open_journal(tmp_path / "out", OF)
    assert [*begun.glob("*.jsonl")]


@pytest.mark.parametrize("call", ["iterdir", "open"])
def test_a_directory_without_rights_is_named(begun, tmp_path, monkeypatch, call):
    original = getattr(Path, call)

    def refuse(path, *args, **kwargs):
        if call == "iterdir" or args == ("a",):
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(ResumeError, match="out.journal cannot be used .*denied"):
        open_journal(tmp_path / "out", OF)


def test_an_output_of_the_future_does_not_make_findings_old(tmp_path, monkeypatch):
    """Findings were forgotten without a word where the model that is replaced has a later date."""
    place = tmp_path / "out"
    small().save_pretrained(place)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        before = cut_after(patch, 50)
        CASES["default"](output_dir=str(place), overwrite=True)
    later = time.time() + 3600
    os.utime(place / "config.json", (later, later))
    with monkeypatch.context() as patch:
        after = cut_after(patch, 10**6)
        CASES["default"](output_dir=str(place), overwrite=True)
    assert sum((before & after).values()) <= 1


def test_what_a_whole_merge_left_is_forgotten(tmp_path, monkeypatch):
    """Killed once the output had its name: another merge does not have to be that one."""
    place = str(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(directory, "remove", Mock(side_effect=Cut))
        didi(clip(), budget=0.6, output_dir=place)
    assert (tmp_path / ".out.journal").is_dir()
    old = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    for file in (tmp_path / ".out.journal").iterdir():
        os.utime(file, ns=(old + 10**10, old + 10**10))
    didi(clip(), budget=0.5, output_dir=place, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        ("Error while serializing: I/O error: x (os error 28)", "make room"),
        ("Error while deserializing header", 'start over: resume="fresh"'),
    ],
)
def test_a_finding_that_cannot_be_read_is_no_full_disk(tmp_path, said, way_out):
    journal = open_journal(tmp_path / "out", OF)
    with pytest.raises(DiDiError) as found, left_if_worth(journal):
        raise SafetensorError(said)
    assert way_out in str(found.value)
    assert ("make room" in str(found.value)) == (way_out == "make room")


@pytest.mark.parametrize("names", [("a.0", "b.0"), ("b.0", "a.0")])
def test_the_line_that_was_written_last_counts(tmp_path, names):
    """Names of runs are drawn at random."""
    for i, name in enumerate(names):
        line = {"done": ["encode", "w"], "sha256": "", "facts": {"run": i}, "of": "x"}
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(sealed(line)) + "\n")
        os.utime(file, (i, i))
    assert read_lines(tmp_path, "x")["encode", "w"].facts == {"run": 1}


def test_an_input_that_cannot_be_merged_leaves_no_journal(tmp_path):
    models = clip()
    with torch.no_grad():
        next(models["svhn"].parameters()).view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError):
        didi(models, output_dir=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_fresh_without_an_output_is_refused():
    with pytest.raises(SettingsError, match="neither is set"):
        DiDiMerging(resume="fresh").run(clip())


def test_goes_on_where_the_program_saves(tmp_path, monkeypatch, goal):
    """A merge in memory has its journal beside the place where the host will save it."""
    place, pool = tmp_path / "saved", BaseModelPool(clip())
    program = SimpleNamespace(merged_model_save_path=str(place), taskpool=None)

    def run():
        method = DiDiMerging(budget=0.6, normalization="root", refine_sweeps=2)
        method._program = program
        return method.run(pool)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 60)
        run()
    with monkeypatch.context() as patch:
        begun = cut_after(patch, 10**6)
        model = run()
        assert {stage for stage, _ in begun} == {"encode"}
    pool.save_model(model, str(place))
    assert weights(place) == goal
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


# --- records -----------------------------------------------------------------------


def test_records_come_back_as_they_were():
    curve = PerTaskCurve(torch.rand(2, 3).double(), torch.arange(3.0), 7)
    value = {"a": (1, 2.5, None, [torch.float16, "x"]), 3: [curve, curve]}
    records = Records((PerTaskCurve,))
    again = records.unpacked(records.packed(value))
    assert again["a"] == value["a"] and again[3][0] is again[3][1]
    assert torch.equal(again[3][0].error, curve.error) and again[3][0].shared == 7
    with pytest.raises(TypeError, match="a Path|PosixPath"):
        records.packed(Path("x"))


def test_records_keep_nothing_that_they_packed(monkeypatch):
    """A walk that referred to itself held copies of all tensors until garbage was looked for."""
    kept: list[weakref.ref] = []

    def save(tensors, **_) -> bytes:
        kept.extend(map(weakref.ref, tensors.values()))
        return b""

    monkeypatch.setattr(checkpoint_records, "save", save)
    gc.disable()
    try:
        Records().packed({"a": [torch.ones(3)]})
        assert [ref() for ref in kept] == [None]
    finally:
        gc.enable()


def test_records_build_nothing_else():
    packed = Records((PerTaskCurve,)).packed(
        PerTaskCurve(torch.ones(1, 1), torch.ones(1))
    )
    with pytest.raises(KeyError, match="PerTaskCurve"):
        Records().unpacked(packed)
    assert issubclass(ResumeError, DiDiError)
