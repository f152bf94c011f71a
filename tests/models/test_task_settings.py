"""Names of classes and settings of generation are each task's own, as its checkpoint says them, wherever a task goes."""

import copy
import json

import pytest
import torch
from exact_models import bert, llama, tokens
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, fine_tuned

from fusion_bench_didi.deltas.plain import OwnDelta
from fusion_bench_didi.editing import (
    AdapterLibrary,
    add_task,
    combine,
    load_tasks,
    remove_task,
)
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError
from fusion_bench_didi.export import to_plain
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.models.task_settings import labels_of, with_own_vocabulary

LABELS = {
    "spam": {0: "ham", 1: "spam"},
    "topic": {0: "arts", 1: "law", 2: "trade"},
    "tone": {0: "neg", 1: "pos"},
}


def classifiers() -> dict:
    base = bert(labels=2)
    base.config.id2label, base.config.label2id = LABELS["tone"], {"neg": 0, "pos": 1}
    found = {BASE: base}
    for seed, (task, names) in enumerate(LABELS.items()):
        start = copy.deepcopy(base) if len(names) == 2 else bert(labels=len(names))
        start.bert.load_state_dict(base.bert.state_dict())
        found[task] = fine_tuned(start, seed)
        found[task].config.id2label = names
        found[task].config.label2id = {name: place for place, name in names.items()}
    return found


def writers(ends=(7, 9)) -> dict:
    """Language models whose texts end by other tokens than the base model's."""
    base = llama()
    base.generation_config.eos_token_id = 5
    found = {BASE: base}
    for seed, end in enumerate(ends):
        found[f"t{seed}"] = fine_tuned(base, seed, scale=0.5)
        found[f"t{seed}"].generation_config.eos_token_id = end
    return found


def on_disk(models, place) -> BaseModelPool:
    for name, model in models.items():
        model.save_pretrained(place / name)
    target = f"transformers.{type(models[BASE]).__name__}.from_pretrained"
    return BaseModelPool(
        {
            name: {
                "_target_": target,
                "pretrained_model_name_or_path": str(place / name),
            }
            for name in models
        }
    )


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> DiDiModel:
    place = tmp_path_factory.mktemp("classifiers")
    model = didi(on_disk(classifiers(), place), budget=9.0)
    model.save_pretrained(place / "merged")
    return DiDiModel.from_pretrained(place / "merged")


def place_of(model: DiDiModel, home) -> str:
    model.save_pretrained(home / "saved")
    return home / "saved"


@pytest.mark.parametrize("form", ["files", "modules"])
def test_plain_models_call_their_classes_as_the_checkpoints_do(form, tmp_path):
    models = classifiers()
    pool = on_disk(models, tmp_path) if form == "files" else BaseModelPool(models)
    model = didi(pool, budget=9.0)
    for task, names in LABELS.items():
        config = model.materialize(task).config
        assert config.id2label == names
        assert config.label2id == {name: place for place, name in names.items()}
    assert model.backbone.config.id2label == LABELS["tone"]
    assert set(model.info["labels"]) == {"spam", "topic"}, "tone's are the base model's"


def test_exports_too(merged, tmp_path):
    to_plain(merged, tmp_path / "out")
    for task, names in LABELS.items():
        config = json.loads((tmp_path / "out" / task / "config.json").read_text())
        assert {int(place): name for place, name in config["id2label"].items()} == names


def edited(way: str, model: DiDiModel, home) -> DiDiModel:
    if way == "saved":
        return DiDiModel.from_pretrained(place_of(model, home))
    if way == "some":
        return load_tasks(place_of(model, home), ["topic", "spam"])
    if way == "library":
        library = AdapterLibrary(home / "library")
        library.add(model)
        return library.load(["topic", "spam"])
    if way == "apart and together":
        place = place_of(model, home)
        one, other = (load_tasks(place, tasks) for tasks in (["spam"], ["topic"]))
        return combine(one, other).model
    found = remove_task(copy.deepcopy(model), "spam").model
    assert set(found.info["labels"]) == {"topic"}
    tuned = classifiers()["spam"]
    return add_task(found, tuned, "spam", budget=4.0).model


WAYS = ["saved", "some", "library", "apart and together", "removed and added"]


@pytest.mark.parametrize("way", WAYS)
def test_names_go_with_their_task(way, merged, tmp_path):
    found = edited(way, merged, tmp_path)
    for task in ("spam", "topic"):
        assert found.materialize(task).config.id2label == LABELS[task]


@pytest.mark.parametrize(
    "told",
    [{"0": 3}, {"0": "a", "2": "b"}, {"-1": "a"}, {"0": ["a"]}, ["a"], "a", {"x": "a"}],
)
def test_names_that_no_merge_wrote_are_refused(told, merged, tmp_path, monkeypatch):
    monkeypatch.setitem(merged.info, "labels", {"spam": told})
    merged.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointMismatchError, match=r"info\.labels\.spam"):
        DiDiModel.from_pretrained(tmp_path / "saved")


def test_settings_that_are_the_base_models_are_not_written():
    models = {**writers((5, 5))}
    assert not {"labels", "generation"} & set(didi(models, budget=9.0).info)


def written(model, prompt, **options) -> list[list[int]]:
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    found = model.generate(prompt, **given)[:, prompt.shape[1] :].tolist()
    return [[token for token in row if token] for row in found]


def ending_early(models) -> dict:
    """Every task ends its text by the third token that it writes."""
    prompt = tokens(1, 5)
    for name, model in models.items():
        model.generation_config.eos_token_id = None
        if name != BASE:
            found = written(model.eval(), prompt, max_new_tokens=3)[0]
            model.generation_config.eos_token_id = found[-1]
    return models


@pytest.mark.parametrize("form", ["files", "modules"])
def test_texts_end_where_the_checkpoints_end_them(form, tmp_path):
    models, prompt = ending_early(writers()), tokens(1, 5)
    pool = on_disk(models, tmp_path) if form == "files" else BaseModelPool(models)
    model = didi(pool, budget=20.0, factor_dtype="float32").eval()
    for task in ("t0", "t1"):
        expected = written(models[task], prompt)
        assert len(expected[0]) <= 3
        assert written(model.materialize(task), prompt) == expected
        assert written(model, prompt, task_ids=[task]) == expected
        model.set_task(task)
        assert written(model, prompt) == expected
        given = (written(m, prompt, eos_token_id=63) for m in (model, models[task]))
        assert next(given) == next(given)
        model.unset_task()
    assert model.backbone.generation_config.eos_token_id is None


def test_tasks_of_other_settings_are_not_one_batch_unless_these_are_given():
    models, prompt = writers(), tokens(2, 5)
    model = didi(models, budget=9.0).eval()
    with pytest.raises(DiDiError, match="eos_token_id.*generation_config"):
        written(model, prompt, task_ids=["t0", "t1"])
    with pytest.raises(DiDiError, match="eos_token_id"):
        written(model, prompt, task_ids=["t0", None])
    written(model, prompt, task_ids=["t0", "t1"], eos_token_id=3)
    config = copy.deepcopy(model.backbone.generation_config)
    written(model, prompt, task_ids=["t0", "t1"], generation_config=config)
    assert written(model, prompt, task_ids=["t0", "t0"])
    for task, temperature in (("t0", 0.5), ("t1", 0.7)):
        model.info["generation"][task] |= {"eos_token_id": 7, "temperature": temperature}  # fmt: skip
    written(model, prompt, task_ids=["t0", "t1"])  # the likeliest tokens
    with pytest.raises(DiDiError, match="temperature"):
        written(model, prompt, task_ids=["t0", "t1"], do_sample=True)
    same = didi(writers((7, 7)), budget=9.0).eval()
    written(same, prompt, task_ids=["t0", "t1"])


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": '])
def test_settings_that_cannot_be_read_are_said_before_tensors_are(content, tmp_path, monkeypatch):  # fmt: skip
    pool = on_disk(writers(), tmp_path)
    (tmp_path / "t1" / "generation_config.json").write_text(content)
    monkeypatch.setattr("fusion_bench_didi.method.didi.merge", lambda *_, **__: 1 / 0)
    with pytest.raises(CheckpointMismatchError, match="t1.*generation_config.json"):
        didi(pool, budget=1.0)


def test_vocabularies_of_their_own_are_known(tmp_path):
    base = llama()
    own = {name: OwnDelta((70, 32), torch.ones(70, 32)) for name in ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip
    model = DiDiModel(base, {}, {"a": own, "b": {}}, unit_bits=1, info={"parents": {"a": str(tmp_path)}})  # fmt: skip
    assert with_own_vocabulary(model) == ["a"]
    (tmp_path / "tokenizer.json").write_text('"of the task"')
    there = tmp_path / "base"
    there.mkdir()
    (there / "tokenizer.json").write_text('"of the base model"')
    to_plain(model, tmp_path / "out", base=there)
    found = {t: (tmp_path / "out" / t / "tokenizer.json").read_text() for t in "ab"}
    assert found == {"a": '"of the task"', "b": '"of the base model"'}


def test_labels_of_no_task_are_the_base_models():
    assert labels_of({"labels": {"a": {"0": "x"}}}, None) == {}
