"""Tokenizers and image processors of the service: each task's own, the base model's where it has none, and a word where it may have."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import normal
from served import (  # fmt: skip
    LIMITS,
    SIZES,
    TASKS,
    WORDS,
    Second,
    alone,
    client,
    png,
    prompts,
    saved,
    words,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from fusion_bench_didi.deltas.plain import OwnDelta
from fusion_bench_didi.errors import CheckpointMismatchError, SettingsError
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.service.limits import Refused
from fusion_bench_didi.service.opening import open_runner

#: The words of the base model in another order, with other special tokens.
TURNED = words([*reversed(WORDS), "[EOS]", "[UNK]", "[PAD]"])
#: More words than the base model has.
MORE = words(["[PAD]", "[UNK]", "[EOS]", *WORDS, *(f"more{i}" for i in range(7))])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=63, eos_token_id=2, max_position_embeddings=64, **SIZES))  # fmt: skip


def with_own(place: Path, backbone, processor, beside: dict, **facts) -> Path:
    """A merged model, of which some tasks have a tokenizer or a processor of their own beside their checkpoints.

    Args:
        beside: by task; None for a checkpoint without.
        facts: as of :func:`~served.saved`.
    """
    parents = {task: str(place / task) for task in beside}
    for task, its in beside.items():
        (place / task).mkdir()
        if its is not None:
            its.save_pretrained(place / task)
    return saved(backbone, processor, place, parents=parents, **facts)


def rows_of_its_own(*names: str, count: int = 70) -> dict[str, OwnDelta]:
    return {name: OwnDelta((count, 32), normal(count, 32, seed=i)) for i, name in enumerate(names)}  # fmt: skip


HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def test_texts_are_made_and_read_by_the_tasks_own_tokenizer(tmp_path):
    """In one batch; equal tokenizers are one."""
    own = {"one": TURNED, "two": words(), "three": TURNED}
    runner = open_runner(with_own(tmp_path, llama(), words(), own), limits=LIMITS)
    held = runner.tokenizers
    assert held["one"] is held["three"] is not held["two"] is held[None]
    rows = [runner.row(TASKS[i % 3], text, 6) for i, text in enumerate(prompts(4))]
    for row, text, found in zip(rows, prompts(4), runner(rows)):
        of_task = AutoTokenizer.from_pretrained(tmp_path / row.task)
        assert found.text == alone(runner, row.task, text, 6, of_task)
    runner.model.router = Second(list(TASKS))
    (routed,) = runner([runner.row(None, "w1 w2", 6)])
    assert routed.text == alone(runner, "two", "w1 w2", 6, words())


def test_texts_end_by_the_tasks_own_tokenizer(tmp_path):
    """Where no settings of generation say by which token."""
    backbone = llama()
    backbone.generation_config.eos_token_id = backbone.config.eos_token_id = None
    first = open_runner(saved(backbone, words(), tmp_path / "free"), limits=LIMITS)
    (free,) = first([first.row("one", "w1 w2", 8)])
    tokenizer = words()
    tokenizer.eos_token = free.text.split()[0]
    place = with_own(tmp_path, backbone, words(), {"one": tokenizer})
    runner = open_runner(place, limits=LIMITS)
    one, two = runner([runner.row(task, "w1 w2", 8) for task in ("one", "two")])
    assert (one.finish, one.tokens) == ("stop", 0)
    assert two.text == alone(runner, "two", "w1 w2", 8, words())


def test_the_base_models_is_not_needed_where_every_task_has_its_own(tmp_path):
    place = with_own(tmp_path, llama(), words(), dict.fromkeys(TASKS, TURNED))
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    runner = open_runner(place, limits=LIMITS)
    (found,) = runner([runner.row("two", "w1 w2", 6)])
    assert found.text == alone(runner, "two", "w1 w2", 6, TURNED)
    shutil.rmtree(tmp_path / "two")
    with pytest.raises(CheckpointMismatchError, match="no Tokenizer.*--base"):
        open_runner(place, limits=LIMITS)


def _gone(place: Path) -> None:
    shutil.rmtree(place)


def _broken(place: Path) -> None:
    (place / "tokenizer.json").write_text("{")


def _without_words(place: Path) -> None:
    (place / "tokenizer.json").unlink()


def _code(place: Path) -> None:
    told = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}  # fmt: skip
    (place / "tokenizer_config.json").write_text(json.dumps(told))


DAMAGED = {
    "is no directory": _gone,
    "has a tokenizer that cannot be read": _broken,
    "has a tokenizer without a vocabulary": _without_words,
    "has a tokenizer that cannot be read: ": _code,
}


@pytest.mark.parametrize("told", DAMAGED)
def test_what_cannot_be_had_is_told_and_is_the_base_models(told, tmp_path, caplog):
    own = {"one": TURNED, "two": None}
    place = with_own(tmp_path, llama(), words(), own)
    DAMAGED[told](tmp_path / "one")
    with caplog.at_level(logging.WARNING, "fusion_bench_didi"):
        runner = open_runner(place, limits=LIMITS)
    (message,) = [one.getMessage() for one in caplog.records]
    assert f"stands in for that of one ({tmp_path / 'one'} {told}" in message
    assert "start again" in message
    assert len(set(map(id, runner.tokenizers.values()))) == 1


def test_the_base_models_is_found_below_home(tmp_path, monkeypatch):
    place = saved(llama(), words(), tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_runner(place, base="~/base").tokenizers["one"]("w0")["input_ids"] == [3]


def test_nothing_is_said_of_models_that_were_in_memory(tmp_path, caplog):
    place = saved(llama(), words(), tmp_path, parents={"one": None})
    with caplog.at_level(logging.WARNING, "fusion_bench_didi"):
        open_runner(place, limits=LIMITS)
    assert not caplog.records


# --- vocabularies of their own ------------------------------------------------------


def test_tasks_with_a_vocabulary_of_their_own_are_served_beside_others(tmp_path):
    deltas = {"one": rows_of_its_own(TABLE, HEAD)}
    place = with_own(tmp_path, llama(), words(), {"one": MORE}, own=deltas)
    runner = open_runner(place, limits=LIMITS)
    texts = ["more1 w2 more6", "w3 w4", "more0", "w1", "w5 w6 w7 w8"]
    tasks = ["one", "two", "one", "three", "one"]
    rows = [runner.row(task, text, 6) for task, text in zip(tasks, texts)]
    assert max(rows[0].content) == 69
    of_task = {**dict.fromkeys(TASKS, words()), "one": MORE}
    for task, text, found in zip(tasks, texts, runner(rows)):
        assert found.text == alone(runner, task, text, 6, of_task[task]), task


def test_those_whose_tokenizer_is_not_found_are_refused(tmp_path):
    deltas = {"one": rows_of_its_own(TABLE, HEAD)}
    place = with_own(tmp_path, llama(), words(), {"one": None}, own=deltas)
    told = "one have a vocabulary of their own, .*one: .*one holds none.*remove-task"
    with pytest.raises(SettingsError, match=told):
        open_runner(place, limits=LIMITS)


def test_those_that_a_router_could_find_are_refused(tmp_path, monkeypatch):
    deltas = {"one": rows_of_its_own(TABLE, HEAD)}
    place = with_own(tmp_path, llama(), words(), {"one": MORE}, own=deltas)
    load = DynamicModel.from_pretrained

    def routed(*given):
        model = load(*given)
        model.router = Second(list(TASKS))
        return model

    monkeypatch.setattr(DynamicModel, "from_pretrained", routed)
    with pytest.raises(SettingsError, match="one have a vocabulary.*attach_router"):
        open_runner(place, limits=LIMITS)


def test_tokens_that_a_model_does_not_know_are_refused(tmp_path):
    """A tokenizer may have been given more of them than the model has rows for, which ended the process on an accelerator."""
    padded = words()
    padded.add_special_tokens({"pad_token": "[OTHER]"})
    place = with_own(tmp_path, llama(), padded, {"one": MORE})
    runner = open_runner(place, limits=LIMITS)
    with pytest.raises(Refused, match="no token 'more1'"):
        runner.row("one", "w1 more1", 4)
    rows = [runner.row("one", text, 4) for text in ("w1 w2", "w3")]
    expected = [alone(runner, "one", text, 4, words()) for text in ("w1 w2", "w3")]
    assert [found.text for found in runner(rows)] == expected


# --- classifiers --------------------------------------------------------------------


def plain_scores(runner, task: str, tokenizer, text: str) -> dict[str, float]:
    inputs = tokenizer([text], return_tensors="pt")
    model = runner.model.materialize(task).eval()
    with torch.no_grad():
        shares = model(**inputs).logits[0].softmax(0)
    return {model.config.id2label[i]: share for i, share in enumerate(shares.tolist())}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=63, max_position_embeddings=64, num_labels=3, **SIZES)  # fmt: skip
    return BertForSequenceClassification(config)


def pieces(place: Path) -> BertTokenizerFast:
    """Of a vocabulary beside nothing else, whose texts have types of tokens too."""
    place.mkdir(exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (place / "vocab.txt").write_text("\n".join([*special, *WORDS[:50]]))
    return BertTokenizerFast(str(place / "vocab.txt"))


def llama_classifier() -> LlamaForSequenceClassification:
    """It finds the last token by what its configuration says pads, which is not what pads here."""
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=63, pad_token_id=7, num_labels=3, **SIZES))  # fmt: skip


@pytest.mark.parametrize("kind", ["keys", "padding", "vocabulary", "vocabulary, pad"])
def test_texts_are_classified_by_the_tasks_own_tokenizer(kind, tmp_path):
    """Whatever it pads by and whichever inputs it makes, beside tasks whose tokenizers make others."""
    deltas = {}
    if kind == "keys":
        place, own = with_own(tmp_path, bert(), words(), {"one": None}), pieces(tmp_path / "one")  # fmt: skip
    elif kind == "padding":
        own = TURNED
        place = with_own(tmp_path, llama_classifier(), words(), {"one": own})
    else:
        own, backbone, table = MORE, bert(), "bert.embeddings.word_embeddings.weight"
        if kind == "vocabulary, pad":
            own = words([*WORDS, "[UNK]", "[EOS]", *(f"more{i}" for i in range(7)), "[PAD]"])  # fmt: skip
            backbone, table = llama_classifier(), TABLE
        deltas = {"one": rows_of_its_own(table)}
        place = with_own(tmp_path, backbone, words(), {"one": own}, own=deltas)
    runner = open_runner(place)
    tasks = ["one", "two", "one", "three", "one"]
    texts = prompts(5)
    if deltas:
        texts[0] += " more3"
    rows = [runner.row(task, text) for task, text in zip(tasks, texts)]
    for task, text, found in zip(tasks, texts, runner(rows)):
        expected = plain_scores(runner, task, own if task == "one" else words(), text)
        assert found == pytest.approx(expected, abs=1e-5), (task, text)


def test_a_text_is_as_long_as_its_own_tokenizer_allows(tmp_path):
    short = words()
    short.model_max_length = 3
    runner = open_runner(with_own(tmp_path, bert(), words(), {"one": short}))
    with pytest.raises(Refused, match="4 tokens, expected 1 to 3"):
        runner.row("one", "w1 w2 w3 w4")
    runner.row("two", "w1 w2 w3 w4")


def test_tokenizers_that_cannot_pad_are_named(tmp_path):
    """Their tasks; the base model's need not, where nobody uses it."""
    unpadded, beyond = words(), words()
    unpadded.pad_token = None
    beyond.add_special_tokens(
        {"pad_token": "[OTHER]"}
    )  # which the model has no row for
    place = with_own(tmp_path, llama_classifier(), unpadded, dict.fromkeys(TASKS, TURNED))  # fmt: skip
    open_runner(place)
    for tokenizer in (unpadded, beyond):
        shutil.rmtree(tmp_path / "two")
        tokenizer.save_pretrained(tmp_path / "two")
        with pytest.raises(SettingsError, match="tokenizer of (the base model, )?two has no pad_token"):  # fmt: skip
            open_runner(place)


def test_a_saved_truncation_is_let_go(tmp_path):
    """What training cut is asked in full; and threads share a tokenizer that nobody changes any more."""
    cut = words()
    cut._tokenizer.enable_truncation(2)
    runner = open_runner(with_own(tmp_path, llama(), words(), {"one": cut}))
    assert runner.tokenizers["one"]._tokenizer.truncation is None
    assert len(runner.row("one", "w1 w2 w3", 1).content) == 3


# --- images -------------------------------------------------------------------------


def test_images_are_processed_by_the_tasks_own_processor(tmp_path, caplog):
    """Of other colors, and of other sizes, which are no one tensor."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")  # fmt: skip
    base = ViTImageProcessor(size={"height": 32, "width": 32})
    own = {
        "one": ViTImageProcessor(size={"height": 48, "width": 48}),
        "two": ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3),  # fmt: skip
        "three": base,
    }
    place = with_own(tmp_path, ResNetForImageClassification(config), base, own)
    runner = open_runner(place)
    assert runner.processors["three"] is runner.processors[None]
    with client(runner) as ask:
        for task in TASKS:
            body = {"model": task, "image": [png(40), png(20)]}
            assert ask.post("/v1/classify", json=body).status_code == 200
    tasks = ["one", "two", "three", "one"]
    sides = [40, 50, 60, 20]
    rows = [runner.row(task, png(side)) for task, side in zip(tasks, sides)]
    for task, side, found in zip(tasks, sides, runner(rows)):
        processor = AutoImageProcessor.from_pretrained(tmp_path / task)
        pixels = torch.tensor([9, 99, 199], dtype=torch.uint8).expand(side, side, 3)
        inputs = processor(pixels.numpy(), return_tensors="pt")
        model = runner.model.materialize(task).eval()
        with torch.no_grad():
            shares = model(**inputs).logits[0].softmax(0).tolist()
        expected = {f"LABEL_{i}": share for i, share in enumerate(shares)}
        assert found == pytest.approx(expected, abs=1e-5), task
    shutil.rmtree(tmp_path / "two")
    open_runner(place)
    assert "The base model's image processor stands in for that of two" in caplog.text


@pytest.mark.parametrize("whose", ["two", "the base model"])
def test_a_processor_whose_images_the_tower_does_not_take_is_an_error_at_the_start(tmp_path, whose):  # fmt: skip
    """The first request would be answered by an error of the model's."""
    right, other = (
        ViTImageProcessor(size={"height": side, "width": side}) for side in (32, 48)
    )
    config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)  # fmt: skip
    its = {"base": right, "beside": {"two": other}}
    if whose != "two":
        its = {"base": other, "beside": {"two": right}}
    place = with_own(tmp_path, ViTForImageClassification(config), its["base"], its["beside"])  # fmt: skip
    with pytest.raises(SettingsError, match=f"image processor of {whose} makes"):
        open_runner(place)


# --- what tasks are written by ------------------------------------------------------

PENALTY = {"repetition_penalty": 1.9}


@pytest.mark.parametrize(
    "of_base, of_one", [({}, PENALTY), (PENALTY, {"repetition_penalty": 1.0})]
)
def test_texts_are_written_by_the_settings_of_their_task(tmp_path, of_base, of_one):
    """The base model's were everybody's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=63, eos_token_id=2, **SIZES))
    model.generation_config.update(**of_base)
    place = saved(model, words(), tmp_path, generation={"one": of_one})
    runner = open_runner(place, limits=LIMITS)
    rows = [(task, text) for task in ("one", "two") for text in prompts(3)]
    found = runner([runner.row(task, text, 8) for task, text in rows])
    texts = [answer.text for answer in found]
    assert texts == [alone(runner, task, text, 8) for task, text in rows]
    of_two = [alone(runner, "one", text, 8) for _, text in rows[:3]]
    runner.model.info["generation"] = {}
    assert of_two != [alone(runner, "one", text, 8) for _, text in rows[:3]]


@pytest.mark.parametrize(
    "settings",
    [PENALTY, {"no_repeat_ngram_size": 1}, {"min_length": 9}, {"forced_eos_token_id": 2}],
)  # fmt: skip
def test_what_pads_a_prompt_is_neither_penalized_nor_counted(tmp_path, settings):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=63, eos_token_id=5, **SIZES))
    model.generation_config.update(**settings)
    with torch.no_grad():
        model.lm_head.weight[5] *= 50  # the likeliest, or the least likely
    tokenizer = words()
    tokenizer.pad_token = "w2"  # what ends a text, too
    runner = open_runner(saved(model, tokenizer, tmp_path), limits=LIMITS)
    rows = [runner.row("one", text, 2 + i) for i, text in enumerate(prompts(9))]
    asked = [runner([row])[0] for row in rows]
    assert runner(rows) == asked


def test_a_last_token_that_pads_texts_is_not_taken_for_padding(tmp_path):
    """A text's end was taken from the model, which looks for the last token that is no padding, and another class was answered."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=63, pad_token_id=None, **SIZES)
    tokenizer = words()
    tokenizer.pad_token = "[EOS]"
    place = saved(LlamaForSequenceClassification(config), tokenizer, tmp_path)
    runner = open_runner(place, limits=LIMITS)
    assert runner.row("one", "w1 w2").content["input_ids"] == [4, 5]
    with pytest.raises(Refused, match="ends in '.EOS.', which is what pads texts"):
        runner.row("one", "w1 [EOS]")
    ended = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    tokenizer._tokenizer.post_processor = ended
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(SettingsError, match="ends every text in '.EOS.'"):
        open_runner(place, limits=LIMITS)
    again = BertConfig(vocab_size=63, pad_token_id=0, **SIZES)
    place = saved(BertForSequenceClassification(again), words(), tmp_path / "bert")
    assert open_runner(place, limits=LIMITS).row("one", "w1 [PAD]")
