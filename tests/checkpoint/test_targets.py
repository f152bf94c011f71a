"""Where a model is saved: only what is ours is replaced, whatever the target is."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from fusion_bench.modelpool import BaseModelPool, CausalLMPool
from fuzz_cases import body, every_form
from helpers import BASE, didi, family
from hostile_directories import rewrite
from saved_directories import TESTS, listing, marked, small

from fusion_bench_didi.artifacts import save_artifact
from fusion_bench_didi.checkpoint import directory as directories
from fusion_bench_didi.checkpoint import exchange, stream
from fusion_bench_didi.checkpoint.directory import (
    alone,
    check_target,
    journal_of,
    whole_directory,
)
from fusion_bench_didi.checkpoint.loaders import place_of
from fusion_bench_didi.checkpoint.ours import is_ours
from fusion_bench_didi.demo.suite import suite_path
from fusion_bench_didi.demo.text_pools import tasks_of
from fusion_bench_didi.editing.library import AdapterLibrary
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError, SettingsError
from fusion_bench_didi.method.baselines.tsv_c import TSVCompression
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.models.pool_saving import attach_saving, check_saving
from fusion_bench_didi.recombination import search
from fusion_bench_didi.recombination.evolution import SearchSettings
from fusion_bench_didi.recombination.library import (
    ModularExpert,
    load_modules,
    save_modules,
)
from fusion_bench_didi.taskpool.text import parquet_files

# --- only what is ours is replaced --------------------------------------------


def other_directory(place: Path, kind: str) -> None:
    """Directories that hold a ``config.json`` and are none of ours."""
    place.mkdir()
    contents = {
        "checkpoint": {"model_type": "clip_vision_model", "hidden_size": 32},
        "adapter": {"peft_type": "LORA", "format": 1},
        "format of another": {"format": 2, "versions": {"torch": "2"}},
        "format as text": {"format": "2", "versions": {"fusion-bench-didi": "1"}},
        "list": [],
    }
    if kind == "files":
        (place / "thesis.tex").write_text("years")
    elif kind == "broken":
        (place / "config.json").write_text("{")
    elif kind == "directory":
        (place / "config.json").mkdir()
    else:
        (place / "config.json").write_text(json.dumps(contents[kind]))
        (place / "model.safetensors").touch()


KINDS = (
    *("checkpoint", "adapter", "format of another", "format as text", "list"),
    *("files", "broken", "directory"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["save", "output_dir", "artifact"])
def test_what_is_not_ours_is_never_overwritten(tmp_path, kind, how):
    """An input checkpoint, say, which also holds a config.json."""
    target = tmp_path / "m"
    other_directory(target, kind)
    before = listing(target)
    models = family(body(), ("a", "b"))
    with pytest.raises(FileExistsError, match="is no saved model of this package"):
        if how == "save":
            small().save_pretrained(target, overwrite=True)
        elif how == "output_dir":
            method = DiDiMerging(output_dir=str(target), overwrite=True)
            method.run(BaseModelPool(models))
        else:
            save_artifact(body(), target, base=body(), types={}, overwrite=True)
    assert listing(target) == before and listing(tmp_path) == ["m"]


def test_what_is_ours_is_overwritten_damaged_or_of_format_1(tmp_path):
    old = TESTS / "data" / "format1"
    for name in ("didi", "static", "merge"):
        shutil.copytree(old / name, tmp_path / name)
        assert is_ours(tmp_path / name)
        small(mark="new").save_pretrained(tmp_path / name, overwrite=True)
        assert marked(tmp_path / name) == "new"
    (tmp_path / "didi" / "model.safetensors").unlink()
    small(mark="newer").save_pretrained(tmp_path / "didi", overwrite=True)
    assert marked(tmp_path / "didi") == "newer"


OTHERS = (
    *("base/model.safetensors", "m2/config.json", ".git/HEAD", "thesis/a.tex"),
    *("backbone/model.safetensors", "experts/0/a.bin", "modules/all-1/a.pt"),
    *("model_backup.safetensors", "router.safetensors"),
)


@pytest.mark.parametrize("name", [*OTHERS, "heads.safetensors", "base.pt"])
@pytest.mark.parametrize("how", ["save", "output_dir"])
def test_what_lies_within_what_is_ours_is_not_lost(tmp_path, monkeypatch, name, how):
    """A base model beside its merge, say, which is where the merge looks for it."""
    small(mark="old").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with pytest.raises(
        FileExistsError, match=rf"also holds {name.split('/')[0]}(/\S+)?, "
    ):
        if how == "save":
            small(mark="new").save_pretrained(tmp_path / "m", overwrite=True)
        else:
            monkeypatch.setattr("fusion_bench_didi.method.base.adapted", never)
            method = DiDiMerging(output_dir=str(tmp_path / "m"), overwrite=True)
            method.run(BaseModelPool(family(body(), ("a", "b"))))
    assert file.read_text() == "mine" and listing(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("individuals", "experts/0/mine.safetensors"),
        ("individuals", "experts/7/mine.bin"),
        ("merge", "modules/mine/model.safetensors"),
        ("merge", "modules/rest-9c3e3e4761d8/mine.pt"),
    ],
)
def test_what_lies_in_a_part_of_what_is_ours_is_not_lost(tmp_path, kind, name):
    shutil.copytree(TESTS / "data" / "format1" / kind, tmp_path / "m")
    mine = tmp_path / "m" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match="also holds (experts|modules)/"):
        small().save_pretrained(tmp_path / "m", overwrite=True)
    assert mine.exists()


PARTS = ("router", "shards", "individuals", "modules", "backbone")


@pytest.mark.parametrize("kind", PARTS)
def test_all_parts_of_what_is_ours_are_overwritten(tmp_path, monkeypatch, kind):
    target, types = tmp_path / "m", {name: p.dtype for name, p in body().named_parameters()}  # fmt: skip
    if kind == "backbone":
        small().save_pretrained(target)
        (target / "backbone").mkdir()
        (target / "backbone" / "model.safetensors").touch()
        files = {"model.safetensors": "0" * 64}
        rewrite(target, lambda config: config.update(backbone_files=files))
    elif kind == "individuals":
        models = family(body(), ("a", "b"))
        base = models.pop("_pretrained_")
        save_artifact(models.items(), target, base=base, types=types)
    elif kind in ("modules", "router"):
        name = {"modules": "merge", "router": "router"}[kind]
        shutil.copytree(TESTS / "data" / "format1" / name, target)
    else:
        monkeypatch.setattr(stream, "SHARD_BYTES", 1000)
        monkeypatch.setattr(stream, "MAX_SHARD", 1000)
        small().save_pretrained(target)
        assert "model.safetensors.index.json" in listing(target)
    (target / ".cache").mkdir()
    for file in (".gitattributes", "tokenizer.json", "report.json"):
        (target / file).touch()
    small(mark="new").save_pretrained(target, overwrite=True)
    assert marked(target) == "new"


def never(*_, **__):
    raise AssertionError("models were read")


# --- targets of all kinds -----------------------------------------------------


@pytest.mark.parametrize("chain", ["absolute", "relative", "two", "parent"])
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path, chain):
    disk, link = tmp_path / "disk" / "m", tmp_path / "latest"
    small(mark="old").save_pretrained(disk)
    if chain == "two":
        os.symlink(disk, tmp_path / "between")
        os.symlink("between", link)
    elif chain == "parent":
        os.symlink("disk", tmp_path / "latest")
        link = tmp_path / "latest" / "m"
    else:
        os.symlink("disk/m" if chain == "relative" else disk, link)
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match="exists"):
        small().save_pretrained(link)
    small(mark="new").save_pretrained(link, overwrite=True)
    assert (tmp_path / "latest").is_symlink() and marked(disk) == marked(link) == "new"
    assert listing(tmp_path) == before and listing(tmp_path / "disk") == ["m"]


def test_a_link_that_leads_nowhere_is_written_where_it_leads(tmp_path):
    os.symlink("disk/deep/m", tmp_path / "latest")
    small(mark="new").save_pretrained(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert marked(tmp_path / "disk" / "deep" / "m") == "new"


def test_a_link_to_itself_is_refused(tmp_path):
    os.symlink("latest", tmp_path / "latest")
    with pytest.raises((FileExistsError, DiDiError), match="latest"):
        small().save_pretrained(tmp_path / "latest", overwrite=True)
    assert listing(tmp_path) == ["latest"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_pipes_and_what_lies_in_them_are_refused(tmp_path, overwrite):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("file", "is a file"),
        ("pipe", "neither a file nor a directory"),
        ("file/deep/m", "is no directory"),
    ):
        with pytest.raises((FileExistsError, DiDiError), match=message):
            small().save_pretrained(tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"
    assert listing(tmp_path) == ["file", "pipe"]


@pytest.mark.parametrize(
    "use",
    [
        lambda place: small().save_pretrained(place),
        lambda place: DiDiModel.from_pretrained(place),
        lambda place: DiDiModel.from_pretrained(Path("m"), str(place)),
        lambda place: didi(CausalLMPool(dict.fromkeys((BASE, "a", "b"), str(place)), tokenizer=None)),  # fmt: skip
        journal_of,
        AdapterLibrary,
        suite_path,
        tasks_of,
        lambda place: parquet_files(place, None, "test"),
        lambda place: place_of(str(place), Path()),
        lambda place: DiDiMerging(output_dir=place)._place(),
    ],
    ids=[
        "target",
        "model",
        "base model",
        "pool",
        "journal",
        "library",
        "suite",
        "texts",
        "parquet",
        "source",
        "output",
    ],
)
def test_the_home_of_a_user_that_there_is_not(tmp_path, monkeypatch, use):
    monkeypatch.chdir(tmp_path)
    small().save_pretrained(tmp_path / "m")
    with pytest.raises(DiDiError, match="~nobodyknows/m begins with the home"):
        use(Path("~nobodyknows/m"))
    assert listing(tmp_path) == ["m"]


NAMES = (
    *("a b", "größe", "日本語", "a.b", "a[b]*?", "-rf", "a'\"b", "a\nb", ".hidden"),
    *("x" * 255, "ö" * 127, "a.tmp", "m.lock"),
)


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(tmp_path, name):
    target = tmp_path / "p q" / "über" / name
    small(mark="old").save_pretrained(target)
    small(mark="new").save_pretrained(target, overwrite=True)
    assert marked(target) == "new" and listing(target.parent) == [name]


@pytest.mark.parametrize("name", ["", " ", "\n"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_name_must_be_given(tmp_path, monkeypatch, name, overwrite):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiDiError, match="name of the directory to write is empty"):
        small().save_pretrained(name, overwrite=overwrite)
    assert listing(tmp_path) == []


def test_a_relative_target_stays_where_it_was_meant(tmp_path, monkeypatch):
    """A method, or the program, may change the directory while it merges."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = small(mark="new")
    with whole_directory("deep/m") as place:
        os.chdir(tmp_path / "there")
        model.write_config(place, model.write_parts(place))
    assert marked(tmp_path / "here" / "deep" / "m") == "new"
    assert listing(tmp_path / "there") == []
    monkeypatch.setenv("HOME", str(tmp_path))
    small(mark="home").save_pretrained("~/m")
    assert marked(tmp_path / "m") == "home"


def test_parents_that_may_not_be_written_to_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        directories.os, "access", lambda path, how: path != tmp_path / "closed"
    )
    (tmp_path / "closed").mkdir()
    with pytest.raises(DiDiError, match="closed may not be written to"):
        check_target(tmp_path / "closed" / "deep" / "m")
    assert check_target(tmp_path / "m") == tmp_path / "m"


@pytest.mark.parametrize("target", [".", "/", "/tmp", "/proc"])
def test_directories_that_hold_others_are_refused(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError):
        check_target(target, overwrite=True)


def test_systems_that_cannot_exchange_names(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "_renamed", lambda *_: False)
    for mark in ("old", "new"):
        small(mark=mark).save_pretrained(tmp_path / "m", overwrite=mark == "new")
        assert marked(tmp_path / "m") == mark and listing(tmp_path) == ["m"]
    (tmp_path / "one").mkdir()
    with pytest.raises(FileExistsError):
        exchange.rename_new(tmp_path / "one", tmp_path / "m")


def test_names_are_exchanged_in_one_step(tmp_path):
    """On the system that the tests run on, lest the way of others is all that is tested."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange._renamed(tmp_path / "one", tmp_path / "other", exchange._EXCHANGE)
    assert listing(tmp_path / "one") == ["other"]
    with pytest.raises(FileExistsError):
        exchange.rename_new(tmp_path / "one", tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        exchange.exchange(tmp_path / "one", tmp_path / "none")


def test_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    """A power cut may keep a name and lose what was written under it."""
    done: list[str] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(directories.os, "fsync", record)
    for function in ("exchange", "rename_new"):
        own = getattr(directories, function)

        def named(*paths, own=own):
            done.append("named")
            own(*paths)

        monkeypatch.setattr(directories, function, named)
    for overwrite in (False, True):
        done.clear()
        small().save_pretrained(tmp_path / "m", overwrite=overwrite)
        before, after = done[: done.index("named")], done[done.index("named") + 1 :]
        (place,) = {os.path.dirname(p) for p in before if p.endswith(".safetensors")}
        written = {os.path.join(place, name) for name in listing(tmp_path / "m")}
        assert {*written, place} <= set(before) and after == [str(tmp_path)]


# --- what the host saves, and comparisons --------------------------------------


def test_the_host_is_told_what_has_no_effect(tmp_path, caplog):
    pool = BaseModelPool({"_pretrained_": body(), "a": body()})
    attach_saving(pool)
    options = {"save_tokenizer": True, "push_to_hub": False, "model_dtype": "float16"}
    pool.save_model(small(mark="x"), str(tmp_path / "m"), **options)
    assert "save_tokenizer, model_dtype have no effect" in caplog.text
    with pytest.raises(FileExistsError):
        pool.save_model(small(), str(tmp_path / "m"))
    pool.save_model(small(mark="y"), str(tmp_path / "m"), overwrite=True)
    assert marked(tmp_path / "m") == "y"


class Program:
    """What is asked of the host's."""

    def __init__(self, path: str | None, log_dir: str | None = None, **options):
        self.merged_model_save_path, self.log_dir = path, log_dir
        self.merged_model_save_kwargs = options or None


def test_where_the_program_saves_is_looked_at_before_the_merge(tmp_path):
    """It saves last, and a merge that took hours was lost."""
    check_saving(None)
    check_saving(Program(None))
    check_saving(Program(str(tmp_path / "new")), str(tmp_path / "other"))
    small().save_pretrained(tmp_path / "logs" / "m")
    for program in (
        Program(str(tmp_path / "logs" / "m")),
        Program("{log_dir}/m", str(tmp_path / "logs")),
        Program("{log_dir}/m", str(tmp_path / "logs"), overwrite=False),
    ):
        with pytest.raises(FileExistsError, match="exists"):
            check_saving(program)
    check_saving(Program("{log_dir}/m", str(tmp_path / "logs"), overwrite=True))
    os.symlink(tmp_path / "new", tmp_path / "link")
    with pytest.raises(SettingsError, match="are both"):
        check_saving(Program(str(tmp_path / "new")), str(tmp_path / "link"))


@pytest.mark.parametrize("make", [DiDiMerging, TSVCompression])
@pytest.mark.parametrize("where", ["program", "output_dir", "file"])
def test_a_merge_whose_place_is_taken_reads_nothing(tmp_path, monkeypatch, make, where):
    small().save_pretrained(tmp_path / "m")
    (tmp_path / "file").write_text("mine")
    pool = BaseModelPool({"_pretrained_": body(), "a": body(), "b": body()})
    place = str(tmp_path / ("file" if where == "file" else "m"))
    method = make(output_dir=None if where == "program" else place)
    if where == "program":
        method._program = SimpleNamespace(taskpool=None, **vars(Program(place)))

    monkeypatch.setattr("fusion_bench_didi.method.base.adapted", never)
    with pytest.raises(FileExistsError, match="another directory"):
        method.run(pool)


def one_module() -> ModularExpert:
    shared, _ = every_form()
    forms = {"conv.weight": shared["conv.weight"]}
    return ModularExpert("all-1", "all", ("a", "b"), "average", forms, {})


@pytest.mark.parametrize("remains", ["shard-0.safetensors", "module.json.tmp", None])
def test_modules_whose_writing_was_cut_short_are_written_anew(tmp_path, remains):
    place = tmp_path / "all-1"
    place.mkdir()
    if remains is not None:
        (place / remains).write_bytes(b"half")
    save_modules(tmp_path, [one_module()])
    assert load_modules(tmp_path, ["all-1"])["all-1"].bits == one_module().bits
    assert listing(place) == ["model.safetensors", "module.json"]
    assert listing(tmp_path) == ["all-1"]


def damage(place, how):
    weights, manifest = place / "model.safetensors", place / "module.json"
    if how == "gone":
        weights.unlink()
    elif how == "another":
        manifest.write_text(manifest.read_text().replace("all-1", "all-2"))
    else:
        file = weights if how == "a bit" else manifest
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["a bit", "gone", "manifest", "another"])
def test_damaged_modules_are_written_anew(tmp_path, caplog, how):
    """What loading advises, to search again, mends them."""
    place = tmp_path / "all-1"
    save_modules(tmp_path, [one_module()])
    damage(place, how)
    with pytest.raises(CheckpointMismatchError):
        load_modules(tmp_path, ["all-1"])
    save_modules(tmp_path, [one_module()])
    assert "written anew" in caplog.text
    assert load_modules(tmp_path, ["all-1"])["all-1"].bits == one_module().bits
    assert listing(place) == ["model.safetensors", "module.json"]


def test_what_is_no_module_stays(tmp_path):
    (tmp_path / "all-1").mkdir()
    (tmp_path / "all-1" / "mine").touch()
    with pytest.raises(FileExistsError, match="all-1 is no whole module"):
        save_modules(tmp_path, [one_module()])
    os.rename(tmp_path / "all-1", tmp_path / "mine")
    save_modules(tmp_path, [one_module()])
    (tmp_path / "all-1" / "notes").touch()
    save_modules(tmp_path, [one_module()])  # whole
    damage(tmp_path / "all-1", "gone")
    with pytest.raises(FileExistsError, match="all-1 is no whole module"):
        save_modules(tmp_path, [one_module()])
    (tmp_path / "all-1" / "notes").unlink()
    save_modules(tmp_path, [one_module()])
    os.rename(tmp_path / "all-1", tmp_path / "all-2")
    with pytest.raises(CheckpointMismatchError, match="mixed up"):
        load_modules(tmp_path, ["all-2"])


def test_a_search_has_its_state_for_itself(tmp_path):
    state = tmp_path / "deep" / "search.json"
    with alone(state), pytest.raises(DiDiError, match="Another run is writing"):
        search.nsga2(None, None, SearchSettings(), state=state)
    with alone(state):
        assert listing(state.parent) == [".search.json.lock"]
