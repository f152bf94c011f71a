"""Names of classes, settings of losses and of generation are each task's own, as its checkpoint says them, wherever a task goes."""

import copy
import json

import pytest
import torch
from exact_models import bert, llama, seeded, tokens
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, fine_tuned, normal
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    YolosConfig,
    YolosForObjectDetection,
)

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
from fusion_bench_didi.pools.task_settings import TASK_SETTINGS

LABELS = {
    "spam": {0: "ham", 1: "spam"},
    "topic": {0: "arts", 1: "law", 2: "trade"},
    "tone": {0: "neg", 1: "pos"},
    "score": {0: "score"},
}
PROBLEMS = {
    "spam": "multi_label_classification",
    "topic": "single_label_classification",
    "tone": None,
    "score": "regression",
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
        found[task].config.problem_type = PROBLEMS[task]
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
        assert config.problem_type == PROBLEMS[task]
    assert model.backbone.config.id2label == LABELS["tone"]
    others = {"spam", "topic", "score"}
    assert set(model.info["labels"]) == others, "tone's are the base model's"
    assert set(model.info["configuration"]) == others


@pytest.mark.parametrize("problem", [*PROBLEMS.values()])
def test_the_current_tasks_configuration_is_its_checkpoints(problem):
    models = classifiers()
    models[BASE].config.problem_type = problem
    model = didi(models, budget=9.0)
    config = model.backbone.config
    for task in (*LABELS, *reversed(LABELS)):
        model.set_task(task)
        assert (config.id2label, config.problem_type) == (LABELS[task], PROBLEMS[task])
        other = model.materialize("topic").config
        assert (other.id2label, other.problem_type) == (LABELS["topic"], PROBLEMS["topic"])  # fmt: skip
        twin = copy.deepcopy(model)
        twin.unset_task()
        assert twin.backbone.config.problem_type == problem
        assert twin.backbone.config.id2label == LABELS["tone"]
    model.unset_task()
    assert (config.id2label, config.problem_type) == (LABELS["tone"], problem)


def test_what_a_forward_finds_out_of_labels_is_of_its_task_alone():
    base = bert(labels=2)
    model = didi({BASE: base, "a": fine_tuned(base, 1), "b": fine_tuned(base, 2)}, budget=9.0)  # fmt: skip
    numbers, inputs = torch.tensor([0, 1]), {"input_ids": tokens(2, 5)}
    several = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    for labels in (numbers, several):
        expected = model.materialize("b")(**inputs, labels=labels).loss
        assert model(**inputs, labels=labels, task_ids=["b", "b"]).loss.allclose(expected)  # fmt: skip
        model(**inputs, labels=labels, task_ids=["a", "b"])
    model.set_task("a")
    model(**inputs, labels=numbers)
    model.set_task("b")
    assert model(**inputs, labels=several).loss.allclose(expected)


def test_exports_too(merged, tmp_path):
    to_plain(merged, tmp_path / "out")
    for task, names in LABELS.items():
        config = json.loads((tmp_path / "out" / task / "config.json").read_text())
        assert {int(place): name for place, name in config["id2label"].items()} == names
        assert config.get("problem_type") == PROBLEMS[task]


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
    assert set(found.info["labels"]) == {"topic", "score"}
    tuned = classifiers()["spam"]
    return add_task(found, tuned, "spam", budget=4.0).model


WAYS = ["saved", "some", "library", "apart and together", "removed and added"]


@pytest.mark.parametrize("way", WAYS)
def test_names_go_with_their_task(way, merged, tmp_path):
    found = edited(way, merged, tmp_path)
    for task in ("spam", "topic"):
        config = found.materialize(task).config
        assert config.id2label == LABELS[task]
        assert config.problem_type == PROBLEMS[task]


@pytest.mark.parametrize(
    "told",
    [{"0": 3}, {"0": "a", "2": "b"}, {"-1": "a"}, {"0": ["a"]}, ["a"], "a", {"x": "a"}],
)
def test_names_that_no_merge_wrote_are_refused(told, merged, tmp_path, monkeypatch):
    monkeypatch.setitem(merged.info, "labels", {"spam": told})
    merged.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointMismatchError, match=r"info\.labels\.spam"):
        DiDiModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "told",
    [
        {"problem_type": "guessing"},
        {"pad_token_id": "0"},
        {"pad_token_id": True},
        {"eos_token_id": [2, "x"]},
        {"decoder.decoder_start_token_id": [1]},
        {"max_position_embeddings": 0},
        {"task_specific_params": [1]},
        {"ctc_loss_reduction": ["sum"]},
        {"ctc_zero_infinity": None},
        {"hidden_act": "relu"},
        {"forward": 1},
        {"problem_type.forward": 1},
        [],
    ],
)
def test_settings_that_no_merge_wrote_are_refused(told, merged, tmp_path, monkeypatch):
    monkeypatch.setitem(merged.info, "configuration", {"spam": told})
    merged.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointMismatchError, match=r"info\.configuration\.spam"):
        DiDiModel.from_pretrained(tmp_path / "saved")


def test_models_saved_before_are_of_the_problems_that_heads_tell(merged, tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.delitem(merged.info, "configuration")
    merged.save_pretrained(tmp_path / "saved")
    found = DiDiModel.from_pretrained(tmp_path / "saved")
    assert found.materialize("topic").config.problem_type is None


def test_settings_that_are_the_base_models_are_not_written():
    models = {**writers((5, 5))}
    assert not {*TASK_SETTINGS} & set(didi(models, budget=9.0).info)


OF_WRITERS = {
    "eos_token_id": [2, 5],
    "pad_token_id": 7,
    "max_position_embeddings": 128,
    "task_specific_params": {"summarization": {"max_length": 9, "prefix": "sum: "}},
}


@pytest.mark.parametrize("form", ["files", "modules"])
def test_configurations_of_exports_say_what_the_checkpoints_do(form, tmp_path):
    models = writers((5, 5))
    for key, value in OF_WRITERS.items():
        setattr(models["t1"].config, key, value)
    pool = on_disk(models, tmp_path) if form == "files" else BaseModelPool(models)
    model = didi(pool, budget=9.0)
    assert model.info["configuration"] == {"t1": OF_WRITERS}
    to_plain(model, tmp_path / "out")
    for task in ("t0", "t1"):
        config = LlamaConfig.from_pretrained(tmp_path / "out" / task)
        for key in OF_WRITERS:
            told, own = (getattr(c, key, None) for c in (config, models[task].config))
            assert told == own


def test_settings_of_an_entry_are_its_models_too(tmp_path):
    pool = on_disk(classifiers(), tmp_path)
    pool._models["tone"]["problem_type"] = "regression"
    model = didi(pool, budget=9.0)
    assert model.materialize("tone").config.problem_type == "regression"


def started() -> tuple[dict, dict]:
    """Models whose decoders start by other tokens, whatever is given to them."""
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)  # fmt: skip
    base = seeded(lambda: T5ForConditionalGeneration(config))
    found = {BASE: base, **{f"t{i}": fine_tuned(base, i) for i in range(2)}}
    found["t1"].config.decoder_start_token_id = 9
    inputs = {"input_ids": tokens(2, 5), "labels": tokens(2, 4)}
    return found, inputs


def classifying() -> tuple[dict, dict]:
    config = BartConfig(
        **{f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))},
        **{"d_model": 32, "vocab_size": 64, "max_position_embeddings": 32},
    )  # fmt: skip
    base = seeded(lambda: BartForSequenceClassification(config))
    found = {BASE: base, **{f"t{i}": fine_tuned(base, i) for i in range(2)}}
    found["t1"].config.decoder_start_token_id = 9
    ids = tokens(2, 5).clamp(min=3)
    ids[:, -1] = config.eos_token_id
    return found, {"input_ids": ids}


def speech(letters: int = 16) -> Wav2Vec2ForCTC:
    sizes = dict(conv_dim=(8,), conv_kernel=(10,), conv_stride=(5,), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)  # fmt: skip
    config = Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=letters, num_feat_extract_layers=1, **sizes)  # fmt: skip
    return seeded(lambda: Wav2Vec2ForCTC(config))


def aligned() -> tuple[dict, dict]:
    """Models of speech, of which one pads by another token, which its loss takes for no letter."""
    base = speech()
    found = {BASE: base, **{f"t{i}": fine_tuned(base, i) for i in range(2)}}
    found["t1"].config.update({"pad_token_id": 3, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True})  # fmt: skip
    labels = torch.tensor([[4, 5, 6], [7, 8, 9]])
    return found, {"input_values": normal(2, 300, seed=1), "labels": labels}


@pytest.mark.parametrize("make", [started, classifying, aligned])
@torch.no_grad()
def test_what_forwards_read_of_configurations_is_the_tasks(make, tmp_path):
    models, inputs = make()
    model = didi(on_disk(models, tmp_path), budget=20.0, factor_dtype="float32").eval()
    expected = {task: models[task].eval()(**inputs) for task in model.tasks}

    def same(found, task):
        for key in ("loss", "logits"):
            if key in expected[task]:
                torch.testing.assert_close(found[key], expected[task][key], rtol=1e-3, atol=1e-4)  # fmt: skip

    for task in model.tasks:
        same(model.materialize(task).eval()(**inputs), task)
        same(model(**inputs, task_ids=[task] * 2), task)
        model.set_task(task)
        same(model(**inputs), task)
        for other in model.tasks:  # whatever task is set
            same(model(**inputs, task_ids=[other] * 2), other)
    model.unset_task()
    if make is not aligned:  # losses over alignments are not added up
        found = model(**inputs, task_ids=["t1", "t0"]).logits
        for row, task in enumerate(("t1", "t0")):
            torch.testing.assert_close(found[row], expected[task].logits[row], rtol=1e-3, atol=1e-4)  # fmt: skip
    assert getattr(model.backbone.config, "decoder_start_token_id", None) != 9


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


@torch.no_grad()
def test_a_vocabulary_of_its_own_is_padded_as_its_task_says():
    """In mixed batches too, where what the base model pads by took its place."""
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)  # fmt: skip
    base = seeded(lambda: LlamaForSequenceClassification(config))
    own = {"model.embed_tokens.weight": OwnDelta((70, 16), normal(70, 16))}
    told = {"configuration": {"own": {"pad_token_id": 69}}}
    model = DiDiModel(base, {}, {"own": own, "other": {}}, unit_bits=1, info=told)
    ids = torch.tensor([[1, 2, 3, 69, 69], [4, 5, 6, 7, 8]])
    expected = model.materialize("own").eval()(ids).logits
    assert model.eval()(ids, task_ids=["own"] * 2).logits.equal(expected)
    assert base.config.pad_token_id == 0


def test_labels_of_no_task_are_the_base_models():
    assert labels_of({"labels": {"a": {"0": "x"}}}, None) == {}


def segmentation(labels: int) -> SegformerForSemanticSegmentation:
    config = SegformerConfig(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=labels)  # fmt: skip
    return seeded(lambda: SegformerForSemanticSegmentation(config))


def detection(labels: int) -> YolosForObjectDetection:
    config = YolosConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[16, 16], patch_size=8, num_detection_tokens=3, num_labels=labels)  # fmt: skip
    return seeded(lambda: YolosForObjectDetection(config))


HEADS = {
    "segmentation": (segmentation, 3, 5, (2, 3, 16, 16)),
    "detection": (detection, 3, 5, (2, 3, 16, 16)),
    "speech": (speech, 16, 20, (2, 300)),
}


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_models_state_the_classes_of_heads_of_other_shapes(kind, tmp_path):
    make, here, there, shape = HEADS[kind]
    models = {BASE: make(here), "a": fine_tuned(make(here), 1), "b": fine_tuned(make(there), 2)}  # fmt: skip
    counts = "vocab_size" if kind == "speech" else "num_labels"
    model = didi(models, budget=20.0, factor_dtype="float32")
    model.set_task("b")
    assert getattr(model.backbone.config, counts) == there
    model.unset_task()
    assert getattr(model.backbone.config, counts) == here
    to_plain(model, tmp_path / "out")
    pixels = normal(*shape, seed=1)
    for task in model.tasks:
        again = type(models[BASE]).from_pretrained(tmp_path / "out" / task)
        assert again.config.id2label == models[task].config.id2label
        expected = models[task].eval()(pixels).logits
        torch.testing.assert_close(again(pixels).logits, expected, rtol=1e-3, atol=1e-4)
    assert with_own_vocabulary(model) == (["b"] if kind == "speech" else [])
