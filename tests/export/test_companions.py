"""Tokenizers, layouts of conversations and processors of exports: each task's own, else the base model's, and a word where neither."""

import os
from pathlib import Path

import pytest
from exact_models import llama
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, family
from huggingface_hub.errors import LocalEntryNotFoundError
from omegaconf import OmegaConf

from fusion_bench_didi.checkpoint import companions
from fusion_bench_didi.checkpoint.companions import companions_at, companions_of
from fusion_bench_didi.editing import add_task
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.export import to_peft, to_plain
from fusion_bench_didi.models.publishing import portable
from fusion_bench_didi.pools.entries import origin_of

#: files of the base model, of a fine-tuned one, and which of them its checkpoint has
CASES = {
    "a tokenizer of its own": (
        {"tokenizer.json": "base", "tokenizer_config.json": "base"},
        {"tokenizer.json": "own", "tokenizer_config.json": "own"},
        {"tokenizer.json": "own", "tokenizer_config.json": "own"},
    ),
    "no layout, though the base model has one": (
        {"tokenizer.json": "base", "chat_template.jinja": "base"},
        {"tokenizer.json": "own", "tokenizer_config.json": "own"},
        {"tokenizer.json": "own", "tokenizer_config.json": "own"},
    ),
    "a layout alone": (
        {"tokenizer.json": "base", "chat_template.jinja": "base"},
        {"chat_template.jinja": "own"},
        {"tokenizer.json": "base", "chat_template.jinja": "own"},
    ),
    "several layouts": (
        {"tokenizer.json": "base", "chat_template.jinja": "base"},
        {"vocab.txt": "own", "additional_chat_templates/tools.jinja": "own"},
        {"vocab.txt": "own", "additional_chat_templates/tools.jinja": "own"},
    ),
    "no second vocabulary of another tokenizer": (
        {"vocab.json": "base", "merges.txt": "base", "processor_config.json": "base"},
        {"tokenizer.json": "own"},
        {"tokenizer.json": "own", "processor_config.json": "base"},
    ),
    "two vocabularies": (
        {"tokenizer.json": "base"},
        {"source.spm": "own", "target.spm": "own", "vocab.json": "own"},
        {"source.spm": "own", "target.spm": "own", "vocab.json": "own"},
    ),
    "nothing": ({"vocab.txt": "base"}, {}, {"vocab.txt": "base"}),
    "all, beside a base model without": ({}, {"spiece.model": "own"}, {"spiece.model": "own"}),
}  # fmt: skip


def written(place: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    place.mkdir(exist_ok=True)
    return place


def exported(tmp_path, of_base, own: Path | str | None, *, export=to_plain, **options):
    """The report of an export of one task, and its checkpoint's files of this kind."""
    model = didi(family(llama()), budget=0.5)
    model.info["parents"] = {"mnist": own and str(own)}
    options = {"base": written(tmp_path / "base", of_base), **options}
    report = export(model, tmp_path / "out", tasks="mnist", overwrite=True, **options)
    home = tmp_path / "out/mnist"
    made = {
        name: (home / name).read_text()
        for name in (str(p.relative_to(home)) for p in home.rglob("*") if p.is_file())
        if name in companions.COMPANIONS or name.endswith(".jinja")
    }
    if export is to_plain:
        made.pop("generation_config.json", None)
    return report, made


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_tasks_checkpoint(case, tmp_path):
    """An instruction-tuned model whose layout of conversations was the base model's, which has none, answers nonsense."""
    of_base, own, wanted = CASES[case]
    for _ in range(2):  # the second over the first
        report, made = exported(tmp_path, of_base, written(tmp_path / "tuned", own))
        assert made == wanted and not report.notes


def _nothing(place: Path) -> None: ...


def _no_vocabulary(place: Path) -> None:
    written(place, {"tokenizer_config.json": "own", "added_tokens.json": "own"})


def _dangling(place: Path) -> None:
    (written(place, {}) / "tokenizer.json").symlink_to(place / "pruned")


def _directory(place: Path) -> None:
    (written(place, {}) / "tokenizer.json").mkdir()


DAMAGED = {
    "is no directory": _nothing,
    "without a vocabulary": _no_vocabulary,
    "has a tokenizer.json that cannot be read": _dangling,
    "tokenizer.json that cannot be read": _directory,
}


@pytest.mark.parametrize("told", DAMAGED)
def test_what_cannot_be_had_is_told_and_is_the_base_models(told, tmp_path):
    DAMAGED[told](tmp_path / "tuned")
    report, made = exported(tmp_path, {"vocab.txt": "base"}, tmp_path / "tuned")
    (note,) = report.notes
    assert (
        note.startswith("mnist: ") and told in note and str(tmp_path / "tuned") in note
    )
    assert made == {"vocab.txt": "base"}


def test_settings_of_generation_are_no_tokenizer(tmp_path):
    """With them beside a base model nothing was said of its tokenizer."""
    files = {"generation_config.json": "{}"}
    report, made = exported(tmp_path, files, written(tmp_path / "tuned", files))
    assert not made and "no tokenizer or processor" in report.notes[0]
    report, _ = exported(tmp_path, {}, None, base=tmp_path / "gone")
    assert f"{tmp_path / 'gone'} is no directory" in report.notes[0]


def test_a_file_that_goes_meanwhile_is_an_error_that_names_it(tmp_path, monkeypatch):
    def gone(source, target):
        raise FileNotFoundError(source)

    monkeypatch.setattr(companions.shutil, "copyfile", gone)
    with pytest.raises(DiDiError, match="vocab.txt cannot be read .*without its task"):
        exported(tmp_path, {"vocab.txt": "base"}, None)
    assert not (tmp_path / "out").exists()


# --- beside adapters ----------------------------------------------------------------

BESIDE = {
    "the base model's": (
        {"tokenizer.json": "base", "preprocessor_config.json": "base"},
        {},
    ),
    "a tokenizer of its own": (
        {"tokenizer.json": "own", "preprocessor_config.json": "base"},
        {"tokenizer.json": "own"},
    ),
    "a layout alone, which no tokenizer is read without": (
        {"chat_template.jinja": "own"},
        {"tokenizer.json": "base", "chat_template.jinja": "own"},
    ),
    "one setting of it": (
        {"tokenizer.json": "base", "tokenizer_config.json": "own"},
        {"tokenizer.json": "base", "tokenizer_config.json": "own"},
    ),
    "a processor": (
        {"preprocessor_config.json": "own"},
        {"preprocessor_config.json": "own"},
    ),
    "ends of texts": (
        {"generation_config.json": "own"},
        {"generation_config.json": "own"},
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_adapters_come_with_what_is_not_the_base_models(case, tmp_path):
    """A task's adapter was read with the base model's tokenizer, without a word."""
    files, expected = BESIDE[case]
    of_base = {"tokenizer.json": "base", "preprocessor_config.json": "base"}
    report, made = exported(
        tmp_path, of_base, written(tmp_path / "tuned", files), export=to_peft
    )
    assert made == expected and not report.notes


@pytest.mark.parametrize("told", DAMAGED)
def test_what_an_adapter_cannot_come_with_is_told(told, tmp_path):
    DAMAGED[told](tmp_path / "tuned")
    report, made = exported(
        tmp_path, {"vocab.txt": "base"}, tmp_path / "tuned", export=to_peft
    )
    (note,) = report.notes
    assert (
        note.startswith("mnist: ") and told in note and str(tmp_path / "tuned") in note
    )
    assert not made


def test_no_tokenizer_lies_beside_an_adapter_that_does_not_know_its_tokens(tmp_path):
    base = llama()
    models = family(base, ("a", "b"))
    models["b"].resize_token_embeddings(base.config.vocab_size + 8)
    settings = {"budget": 2.0, "own": ["*embed_tokens*", "*lm_head*"]}
    model = didi(models, **settings)
    tuned = written(tmp_path / "tuned", {"tokenizer.json": "own"})
    model.info["parents"] = {"a": None, "b": str(tuned)}
    report = to_peft(model, tmp_path / "out")
    told = [note for note in report.notes if "vocabulary of its own" in note]
    assert len(told) == 1 and told[0].startswith("b ")
    assert not (tmp_path / "out/b/tokenizer.json").exists()


# --- where they are looked for ------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple]:
    """What the hub is asked for; it has everything."""
    calls: list[tuple] = []
    place = written(tmp_path / "hub", {"vocab.txt": "hub", "deep/vocab.txt": "deep"})

    def snapshot_download(repository, revision=None, allow_patterns=()):
        calls.append((repository, revision))
        return str(place)

    monkeypatch.setattr(companions, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    "origin, asked, text",
    [
        ("user/name", ("user/name", None), "hub"),
        ("user/name@v1", ("user/name", "v1"), "hub"),
        ("user/name@refs%2Fpr%2F1/deep", ("user/name", "refs/pr/1"), "deep"),
    ],
)
def test_repositories_are_those_of_the_merge(hub, origin, asked, text):
    found = companions_of(origin)
    assert hub == [asked] and found.files["vocab.txt"].read_text() == text


@pytest.mark.parametrize("origin", ["gpt2", "chat", "a/b/c", "../m", "", "m/"])
def test_a_name_of_no_place_is_asked_of_nobody(hub, origin, tmp_path, monkeypatch):
    """The hub was asked for a stranger's repository of a directory's name, and another directory of that name was taken."""
    monkeypatch.chdir(tmp_path)
    if origin.strip("./"):
        written(tmp_path / origin, {"vocab.txt": "other"})
    found = companions_of(origin)
    assert not hub and not found.files and "no place" in found.fault


def test_a_directory_here_is_no_repository(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "user/name", {"vocab.txt": "other"})
    assert companions_of("user/name").files["vocab.txt"].read_text() == "hub"
    assert (
        companions_at("user/name").files["vocab.txt"].read_text() == "other"
    )  # asked for by the user
    assert companions_of(str(tmp_path / "gone")).fault == "is no directory"


def test_offline_is_told(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(companions, "snapshot_download", offline)
    assert "cannot be fetched" in companions_of("user/name").fault


def test_where_models_came_from_is_found_from_anywhere(tmp_path, monkeypatch):
    """Relative paths were kept as they were typed, and meant others elsewhere."""
    monkeypatch.chdir(written(tmp_path / "here", {"m/config.json": "{}"}))
    load = "transformers.LlamaModel.from_pretrained"

    def entry(place, **given) -> dict:
        return {"_target_": load, "pretrained_model_name_or_path": place, **given}

    entries = {
        "typed": "m",
        "deep": entry("m", subfolder="deep"),
        "hub": "user/name",
        "at": entry("user/name", revision="refs/pr/1", subfolder="deep"),
        "folder": entry("user/name", subfolder="deep"),
        "revision": entry("user/name", revision="v1"),
    }
    pool = BaseModelPool(OmegaConf.create(entries))
    pool._models["live"] = None
    here = tmp_path / "here" / "m"
    assert {name: origin_of(pool, name) for name in [*entries, "live"]} == {
        "typed": str(here),
        "deep": str(here / "deep"),
        "hub": "user/name",
        "at": "user/name@refs%2Fpr%2F1/deep",
        "folder": "user/name@main/deep",
        "revision": "user/name@v1",
        "live": None,
    }


def test_merged_and_added_tasks_are_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, model in family(llama(), ("a", "b", "c")).items():
        model.save_pretrained(tmp_path / name)
        written(tmp_path / name, {"vocab.txt": name})
    load = "transformers.LlamaForCausalLM.from_pretrained"
    pool = BaseModelPool(
        {
            name: {"_target_": load, "pretrained_model_name_or_path": name}
            for name in (BASE, "a", "c")
        }
    )
    model = didi(pool, budget=0.5)
    add_task(model, "b", "b", budget=0.5)
    monkeypatch.chdir(written(tmp_path / "elsewhere", {"a/vocab.txt": "other"}))
    to_plain(model, "out", base=tmp_path / BASE)
    for task in "abc":
        assert Path("out", task, "vocab.txt").read_text() == task
    assert portable(model.info)["parents"] == {t: t for t in "acb"}
    assert not companions_of(portable(model.info)["parents"]["a"]).files
    assert os.path.isabs(model.info["parents"]["b"])
