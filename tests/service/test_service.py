"""The service: answers as of each task's plain model, whatever runs beside them, and a reason for what is refused."""

import base64
import inspect
import json
import shutil
import socket
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fastapi import FastAPI
from helpers import normal
from safetensors.torch import save_file
from served import (
    LIMITS,
    SIZES,
    TASKS,
    Second,
    alone,
    client,
    png,
    prompts,
    saved,
    words,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPImageProcessor,
    CLIPImageProcessorFast,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    pipeline,
)

from fusion_bench_didi.cli import didi
from fusion_bench_didi.deltas.plain import OwnDelta
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError, SettingsError
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.service.batching import Batcher, Row
from fusion_bench_didi.service.limits import Limits, Refused
from fusion_bench_didi.service.opening import open_runner


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=63, eos_token_id=2, max_position_embeddings=64, **SIZES)  # fmt: skip
    return saved(LlamaForCausalLM(config), words(), tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    config = BertConfig(vocab_size=63, max_position_embeddings=64, id2label=labels, **SIZES)  # fmt: skip
    model = BertForSequenceClassification(config)
    return saved(model, words(), tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **SIZES))
    sides = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    place = tmp_path_factory.mktemp("images")
    merged = saved(model, CLIPImageProcessor(**sides), place)
    labels = {task: [f"{task} {i}" for i in range(3)] for task in TASKS}
    tensors = {task: normal(3, 32, seed=i) for i, task in enumerate(TASKS)}
    save_file(tensors, place / "heads", {"labels": json.dumps(labels)})
    return merged


@pytest.fixture(scope="module")
def runner(language):
    found = open_runner(language, limits=LIMITS)
    found.model.router = Second(list(TASKS))
    return found


@pytest.fixture(scope="module")
def ask(runner):
    with client(runner) as found:
        yield found


def test_models_are_tasks(ask):
    found = ask.get("/v1/models").json()
    assert [model["id"] for model in found["data"]] == [*TASKS, "routed"]
    assert ask.get("/health").json() == {"status": "ok", "waiting": 0}


def test_requests_of_several_tasks_at_once_are_answered_as_by_each_task(ask, runner):
    asked = [(TASKS[i % 3], text, 1 + i % 8) for i, text in enumerate(prompts(6))]

    def send(task, text, tokens):
        body = {"model": task, "prompt": text, "max_tokens": tokens}
        return ask.post("/v1/completions", json=body).json()

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda one: send(*one), asked))
    for (task, text, tokens), answer in zip(asked, found):
        (choice,) = answer["choices"]
        assert choice["text"] == alone(runner, task, text, tokens), (task, text)
        assert choice["finish_reason"] in ("stop", "length")
        assert answer["usage"]["completion_tokens"] <= tokens
        assert answer["model"] == task


def test_several_prompts_and_the_router(ask, runner):
    body = {"model": "routed", "prompt": prompts(3), "max_tokens": 4}
    found = ask.post("/v1/completions", json=body).json()
    expected = [alone(runner, "two", text, 4) for text in prompts(3)]
    assert [choice["text"] for choice in found["choices"]] == expected
    mixed = [Row(None, [5, 6], 4), Row("one", [7, 8, 9], 4)]
    texts = [answer.text for answer in runner(mixed)]
    assert texts == [alone(runner, "two", "w2 w3", 4), alone(runner, "one", "w4 w5 w6", 4)]  # fmt: skip


GOOD = {"model": "one", "prompt": "w1 w2", "max_tokens": 2}


@pytest.mark.parametrize(
    "status, told, change",
    [
        (404, "does not exist; there are", {"model": "four"}),
        (400, 'prompt is ""; expected a text', {"prompt": ""}),
        (400, "prompt is []; expected a text", {"prompt": []}),
        (400, "prompt is 5; expected a text", {"prompt": 5}),
        (400, "...; expected a text", {"prompt": [5, "w1"] * 40}),
        (400, "model is 5; expected a name", {"model": 5}),
        (400, "at most 8", {"max_tokens": 9}),
        (400, "max_tokens is 0; expected a whole", {"max_tokens": 0}),
        (400, 'max_tokens is "2"; expected a whole', {"max_tokens": "2"}),
        (400, "temperature is 1.0; expected 0", {"temperature": 1.0}),
        (400, "stream is true; expected false", {"stream": True}),
        (400, "logit_bias is not known", {"logit_bias": {}}),
        (400, "20 tokens, expected 1 to 12", {"prompt": "w1 " * 20}),
        (400, "5 inputs in one request, at most 4", {"prompt": ["w1"] * 5}),
        (413, "more than 2048 bytes", {"prompt": "w1 " * 2000}),
    ],
)
def test_bad_requests_are_told_why(ask, status, told, change):
    answer = ask.post("/v1/completions", json={**GOOD, **change})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert told in error["message"] and error["code"] == status
    assert len(error["message"].split(". ")) == 1
    assert ask.post("/v1/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain"])
def test_bodies_that_are_sent_as_something_else_are_told_what_as(ask, kind):
    """As curl sends them where no header is given."""
    body = json.dumps(GOOD).encode()
    answer = ask.post("/v1/completions", content=body, headers={"content-type": kind})
    assert answer.status_code == 400
    told = answer.json()["error"]["message"]
    assert told.endswith("send the header content-type: application/json.")


def test_other_paths_are_told_which_there_are(ask):
    paths = (
        "GET /health, GET /v1/models, POST /v1/completions, POST /v1/chat/completions."
    )
    for method, path, status in (
        ("POST", "/v1/classify", 404),
        ("GET", "/v1/completions", 405),
    ):
        answer = ask.request(method, path)
        assert answer.status_code == status
        told = answer.json()["error"]["message"]
        assert told == f"There is no {method} {path}; this model answers {paths}"


def test_a_model_that_there_is_not_is_told_first(ask, texts):
    change = {"model": "four", "max_tokens": 9, "prompt": ["w1"] * 5}
    found = ask.post("/v1/completions", json={**GOOD, **change})
    assert found.status_code == 404 and "'four' does not exist" in found.text
    with client(open_runner(texts, limits=LIMITS)) as other:
        found = other.post("/v1/classify", json={"model": "four", "image": "aa"})
        assert found.status_code == 404 and "'four' does not exist" in found.text
        found = other.post("/v1/classify", json={"model": "one", "image": "aa"})
        assert found.status_code == 400 and "classifies input" in found.text


def test_bodies_that_are_no_json_or_of_no_told_length(ask):
    kind = {"content-type": "application/json"}
    path = "/v1/completions"

    def told(body: bytes, headers: dict[str, str] = kind) -> str:
        answer = ask.post(path, content=body, headers=headers)
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    for body in (b"{", b"[1]", b'"x"', b""):
        assert told(body).startswith("The body is not a JSON object; send one with")
    assert told(b"\x80\x04N.") == "The body is not JSON in UTF-8."
    # before releases that ask for the type of a body, bytes were read as JSON
    asks = "strict_content_type" in inspect.signature(FastAPI).parameters
    reason = "content-type: application/json" if asks else "JSON in UTF-8"
    assert reason in told(b"\x80\x04N.", {})
    both = told(b"{}")
    assert "model is missing" in both and "prompt is missing" in both

    def parts():
        for _ in range(100):
            yield b" " * 100

    assert ask.post(path, content=parts(), headers=kind).status_code == 413
    assert ask.get(path).status_code == 405
    assert ask.get("/v1/nothing").status_code == 404
    assert ask.post("/v1/classify", json={}).status_code == 404


def test_a_full_queue_and_a_failing_batch(runner, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(rows):
        begun.set()
        go.wait(60)
        raise ZeroDivisionError

    batcher = Batcher(slow, LIMITS)
    (first,) = batcher.submit([Row("one", [1])])
    assert begun.wait(60)
    waiting = batcher.submit([Row("one", [1]) for _ in range(6)])
    with pytest.raises(Refused, match="6 inputs wait") as refused:
        batcher.submit([Row("one", [1])])
    assert refused.value.status == 429
    waiting[0].cancel()
    go.set()
    for one in (first, *waiting[1:]):
        assert isinstance(one.exception(60), ZeroDivisionError)
    batcher.close()
    with pytest.raises(Refused) as refused:
        batcher.submit([Row("one", [1])])
    assert refused.value.status == 503


def test_batches_that_nobody_waits_for_any_more_leave_nothing_behind():
    depths: Queue[int] = Queue()

    class Watched(Future):
        def set_running_or_notify_cancel(self) -> bool:
            depths.put(len(inspect.stack(0)))
            return super().set_running_or_notify_cancel()

    batcher, found = Batcher(list, LIMITS), []
    for _ in range(3):
        row = Row("one", 1, answer=Watched())
        row.answer.cancel()
        batcher.submit([row])
        found.append(depths.get(timeout=60))
    batcher.close()
    assert len(set(found)) == 1


def test_every_token_that_ends_a_text_ends_it(language):
    """Those of the generation config, and the tokenizer's where that says none."""
    runner = open_runner(language, limits=LIMITS)
    row = runner.row("one", "w1 w2", 8)
    ids = torch.tensor([row.content])
    free = runner.model.materialize("one").eval()
    free.generation_config.eos_token_id = None
    found = free.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    end, lengths, inner = int(found[0, -1]), [], runner.model.generate

    def generate(**given):
        out = inner(**given)
        lengths.append(out.shape[1] - ids.shape[1])
        return out

    runner.model.generate = generate
    for of_config, of_tokenizer in ((end, 2), ([2, end], 2), (None, end)):
        runner.model.backbone.generation_config.eos_token_id = of_config
        runner.tokenizers["one"].eos_token_id = of_tokenizer
        made = type(runner)(runner.model, runner.tokenizers, LIMITS)
        (answer,) = made([row])
        assert (answer.finish, answer.text, lengths[-1]) == ("stop", "", 1)


def test_prompts_that_have_no_room_beside_one_another(runner, monkeypatch):
    """A long one that ends soon, and a short one that goes on: each has room by itself."""
    monkeypatch.setattr(runner, "places", 14)
    long, short = " ".join(["a"] * 10), "a"
    rows = [runner.row("one", long, 4), runner.row("two", short, 12)]
    generate, lengths = runner.model.generate, []

    def seen(**inputs):
        more = inputs["max_new_tokens"]
        lengths.append(inputs["input_ids"].shape[1] + more)
        return generate(**inputs)

    monkeypatch.setattr(runner.model, "generate", seen)
    assert [one.prompt_tokens for one in runner(rows)] == [10, 1]
    assert lengths and max(lengths) <= 14


@pytest.mark.parametrize("kind", ["llama", "gpt2", "rwkv", "mamba", "mamba2"])
def test_prompts_of_several_lengths_go_on_as_by_themselves(kind, tmp_path):
    """Also where the model reads what pads them, as models with a state do: they continue them one by one."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=63, eos_token_id=2, pad_token_id=0, initializer_range=0.3)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **SIZES)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes)),  # fmt: skip
        "rwkv": lambda: RwkvForCausalLM(RwkvConfig(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64, **sizes)),  # fmt: skip
        "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=8, **sizes)),  # fmt: skip
        "mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **sizes)),  # fmt: skip
    }[kind]()
    runner = open_runner(saved(model, words(), tmp_path), limits=LIMITS)
    rows = [runner.row(t, p, 6) for t, p in zip(TASKS, ["w9", "w1 w2 w3 w4 w5", "w6"])]
    together = [answer.text for answer in runner(rows)]
    assert together == [runner([row])[0].text for row in rows]
    if not kind.startswith("mamba"):  # which transformers 5 has taught to
        assert runner.skips_padding == (kind != "rwkv")


def test_texts_end_by_the_tokens_of_their_task(language):
    """Those of its checkpoint, beside tasks that end by others; of any where the router finds the task."""
    runner = open_runner(language, limits=LIMITS)
    rows = [runner.row(task, "w1 w2", 8) for task in TASKS]
    free = [list(map(int, answer.text.replace("w", "").split())) for answer in runner(rows)]  # fmt: skip
    third = {t: place[2] + 3 for t, place in zip(TASKS, free)}
    runner.model.info["generation"] = {t: {"eos_token_id": third[t]} for t in ("one", "two")}  # fmt: skip
    found = [answer.tokens for answer in runner(rows)]
    assert max(found[:2]) <= 2 and found[2] == 8
    runner.model.router = Second(list(TASKS))
    (routed,) = runner([runner.row(None, "w1 w2", 8)])
    assert routed.tokens <= 2


def test_classes_are_called_as_their_task_calls_them(texts):
    runner = open_runner(texts, limits=LIMITS)
    names = {"0": "left", "1": "right", "2": "centre"}
    runner.model.info["labels"] = {"one": names}
    rows = [runner.row(task, "w1 w2") for task in ("one", "two")]
    one, two = runner(rows)
    assert set(one) == set(names.values()) and set(two) == {"no", "yes", "perhaps"}


def test_tasks_that_the_tokenizer_does_not_know_are_not_served(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=63, eos_token_id=2, **SIZES))
    merged = saved(model, words(), tmp_path)
    whole = DynamicModel.from_pretrained(merged)
    own = {name: OwnDelta((70, 32), torch.ones(70, 32)) for name in ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip
    DynamicModel(whole.backbone, {}, {"one": own, "two": {}}, unit_bits=1, info=whole.info).save_pretrained(merged, overwrite=True)  # fmt: skip
    with pytest.raises(SettingsError, match="one.*vocabulary of their own"):
        open_runner(merged, limits=LIMITS)


def test_a_row_that_fails_fails_alone():
    def run(rows):
        if any(row.content == "bad" for row in rows):
            raise RuntimeError("no such row")
        return [row.content for row in rows]

    batcher = Batcher(run, LIMITS)
    good, bad, other = batcher.submit([Row("a", "1"), Row("a", "bad"), Row("a", "2")])
    assert good.result(60) == "1" and other.result(60) == "2"
    with pytest.raises(RuntimeError, match="no such row"):
        bad.result(60)
    batcher.close()


def test_errors_inside_are_not_told(language, monkeypatch):
    runner = open_runner(language, limits=LIMITS)
    monkeypatch.setattr(type(runner), "__call__", lambda *_: 1 / 0)
    with client(runner) as ask:
        answer = ask.post("/v1/completions", json=GOOD)
        assert answer.status_code == 500 and "division" not in answer.text


@pytest.mark.parametrize("limit", [None, 0])
def test_texts_are_classified(texts, limit):
    runner = open_runner(texts, limits=Limits(memory_limit_gb=limit))
    ids = runner.processors["one"](prompts(3), padding=True, return_tensors="pt")
    with client(runner) as ask:
        for task in TASKS:
            body = {"model": task, "input": prompts(3)}
            found = ask.post("/v1/classify", json=body).json()["data"]
            with torch.no_grad():
                shares = runner.model.materialize(task).eval()(**ids).logits.softmax(1)
            labels = runner.model.backbone.config.id2label
            for one, row in zip(found, shares):
                expected = {labels[i]: share for i, share in enumerate(row.tolist())}
                assert one["scores"] == pytest.approx(expected, abs=1e-5)
                assert one["label"] == max(expected, key=expected.get)
        wrong = {"model": "one", "image": "aaaa"}
        assert ask.post("/v1/classify", json=wrong).status_code == 400
        assert ask.post("/v1/classify", json={"model": "one"}).status_code == 400


def test_tasks_with_heads_of_their_own_shapes(texts):
    """Which run one after another, in the order in which they came."""
    runner = open_runner(texts)
    for task, count in zip(TASKS, (2, 4)):
        deltas = runner.model.modulators[task].deltas
        deltas["classifier.weight"] = OwnDelta(
            (count, 32), normal(count, 32, seed=count)
        )
        deltas["classifier.bias"] = OwnDelta((count,), torch.zeros(count))
    asked = ["two", "one", "three", "one", "two"]
    rows = [runner.row(task, text) for task, text in zip(asked, prompts(5))]
    found = runner(rows)
    assert [len(scores) for scores in found] == [4, 2, 3, 2, 4]
    for row, scores in zip(rows, found):
        (one,) = runner([row])
        assert one == pytest.approx(scores, abs=1e-5)


def test_answers_are_those_of_the_problem_that_a_task_is(texts):
    """As the pipeline of transformers gives them for each task's model."""
    runner = open_runner(texts)
    problems = ["multi_label_classification", "regression", "single_label_classification", None]  # fmt: skip
    told = [{}, *({"problem_type": problem} for problem in problems)]
    runner.model.backbone.config.problem_type = "regression"
    for count in (3, 1):
        if count == 1:
            for expert in runner.model.modulators.values():
                expert.deltas["classifier.weight"] = OwnDelta((1, 32), normal(1, 32, seed=1))  # fmt: skip
                expert.deltas["classifier.bias"] = OwnDelta((1,), torch.ones(1))
        for one in told:
            runner = type(runner)(runner.model, runner.processors, images=False, limits=LIMITS)  # fmt: skip
            runner.model.info["configuration"] = {"one": one}
            runner.model.backbone_changed()
            (found,) = runner([runner.row("one", "w1 w2")])
            plain = runner.model.materialize("one").eval()
            asked = pipeline("text-classification", model=plain, tokenizer=runner.processors["one"], top_k=None)  # fmt: skip
            (answers,) = asked(["w1 w2"])
            assert found == pytest.approx({a["label"]: a["score"] for a in answers}, abs=1e-5)  # fmt: skip
            assert list(found) == sorted(found, key=found.get, reverse=True)


def test_images_are_classified_by_heads(images):
    runner = open_runner(images, heads=images.parent / "heads", limits=LIMITS)
    with client(runner) as ask:
        for task in TASKS:
            body = {"model": task, "image": png(40)}
            (one,) = ask.post("/v1/classify", json=body).json()["data"]
            pixels = runner._pixels(task, png(40))[None]
            with torch.no_grad():
                plain = runner.model.materialize(task).eval()(pixels).pooler_output[0]
            shares = (runner.heads.directions[task] @ plain).softmax(0).tolist()
            expected = {f"{task} {i}": share for i, share in enumerate(shares)}
            assert one["scores"] == pytest.approx(expected, abs=1e-5)
        for wrong, told in (
            ("?", "expected base64"),
            (base64.b64encode(b"no image").decode(), "expected base64"),
            (png(101), "101 x 101 pixels"),
            # of 900 pixels, and of 900,000 once its shorter side is 32
            (png(1, 900), "1 x 900 pixels"),
            (png(900, 1), "900 x 1 pixels"),
        ):
            answer = ask.post("/v1/classify", json={"model": "one", "image": wrong})
            assert answer.status_code == 400 and "image" in answer.text
            assert told in answer.text


class AsTimms:
    """Processes as transformers' wrapper of timm's transforms, which is told of no layout."""

    def __init__(self, **sides):
        self.processor = CLIPImageProcessor(**sides)

    def preprocess(self, images, return_tensors="pt"):
        sides = {"images": np.array(images), "input_data_format": "channels_last"}
        return self.processor(**sides, return_tensors=return_tensors)

    __call__ = preprocess


def test_heads_are_read_before_a_processor_is_looked_for(images, tmp_path):
    """A typo is told at once, not after what has to be fetched."""
    base = shutil.copytree(images.parent / "base", tmp_path / "base")
    (base / "preprocessor_config.json").unlink()
    with pytest.raises((DiDiError, OSError), match="nowhere"):
        open_runner(images, base=str(base), heads=tmp_path / "nowhere")


@pytest.mark.parametrize("kind", [CLIPImageProcessor, CLIPImageProcessorFast, AsTimms])
@pytest.mark.parametrize("sides", [(1, 1), (3, 3), (8, 1), (8, 3), (1, 8), (3, 8)])
def test_sides_of_few_pixels_are_not_taken_for_the_colors(images, kind, sides):
    runner = open_runner(images, heads=images.parent / "heads")
    runner.processors["one"] = kind(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    assert runner._pixels("one", png(*sides)).allclose(runner._pixels("one", png(40)))


def test_inputs_that_the_router_finds_no_task_for(images, texts):
    """Of heads of their own nobody knows which then; a head that all share is the shared model's."""

    class Nobody(Second):
        def route(self, model, *args, **kwargs):
            (size,) = {len(value) for value in kwargs.values()}
            return torch.zeros(size, 3)

    runner = open_runner(images, heads=images.parent / "heads", limits=LIMITS)
    runner.model.router = Nobody(list(TASKS))
    with client(runner) as ask:
        body = {"model": "routed", "image": png(40)}
        answer = ask.post("/v1/classify", json=body)
        assert answer.status_code == 400 and "found no task" in answer.text
        body["model"] = "one"
        assert ask.post("/v1/classify", json=body).status_code == 200
    runner = open_runner(texts)
    runner.model.router = Nobody(list(TASKS))
    for own in (False, True):
        if own:
            deltas = runner.model.modulators["one"].deltas
            deltas["classifier.weight"] = OwnDelta((5, 32), normal(5, 32))
            deltas["classifier.bias"] = OwnDelta((5,), torch.zeros(5))
            vars(runner).pop("apart")
        (found,) = runner([runner.row(None, "w1 w2")])
        ids = runner.processors["one"](["w1 w2"], return_tensors="pt")
        with torch.no_grad():
            expected = runner.model(**ids, task_ids=[None]).logits.softmax(1).max()
        assert max(found.values()) == pytest.approx(float(expected), abs=1e-5)


def test_a_router_that_mixes_heads_of_other_shapes_is_refused(texts):
    runner = open_runner(texts)
    runner.model.modulators["one"].deltas["classifier.weight"] = OwnDelta((5, 32), normal(5, 32))  # fmt: skip
    runner.model.router = Second(list(TASKS), hard=False)
    with pytest.raises(SettingsError, match="hard=true"):
        type(runner)(runner.model, runner.processors, images=False, limits=LIMITS)


@pytest.mark.parametrize("pads", [True, False])
def test_decoders_are_told_what_pads_texts(tmp_path, pads):
    """Their configurations need not say it; a tokenizer that cannot pad is refused before anything is asked."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=63, max_position_embeddings=64, pad_token_id=None, num_labels=3, **SIZES)  # fmt: skip
    tokenizer = words()
    if not pads:
        tokenizer.pad_token = None
    place = saved(LlamaForSequenceClassification(config), tokenizer, tmp_path)
    if not pads:
        with pytest.raises(SettingsError, match="no pad_token.*tokenizer_config.json"):
            open_runner(place)
        return
    saved_model = DynamicModel.from_pretrained(place)
    saved_model.info["configuration"] = {"one": {"pad_token_id": 5}}
    saved_model.save_pretrained(place, overwrite=True)
    runner = open_runner(place)
    rows = [runner.row(TASKS[i % 3], text) for i, text in enumerate(prompts(4))]
    for row, text, found in zip(rows, prompts(4), runner(rows)):
        ids = runner.processors["one"]([text], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            plain = runner.model.materialize(row.task).eval()(ids).logits[0]
        assert sorted(found.values()) == pytest.approx(sorted(plain.softmax(0).tolist()), abs=1e-5)  # fmt: skip


@pytest.mark.parametrize("fault", ["no file", "no json", "labels", "width"])
def test_heads_that_do_not_fit_are_said_before_anything_is_asked(
    images, tmp_path, fault
):
    file, labels = tmp_path / "heads", {task: ["a", "b"] for task in TASKS}
    tensors = {task: torch.ones(2, 24 if fault == "width" else 32) for task in TASKS}
    told = {"no json": "{", "labels": "[1]"}.get(fault, json.dumps(labels))
    save_file(tensors, file, {"labels": told})
    if fault == "no file":
        file.write_text("nothing")
    with pytest.raises(
        CheckpointMismatchError, match=r"expected a tensor \(classes, 32\)"
    ):
        open_runner(images, heads=file)


def test_frequencies_keep_their_type(language):
    runner = open_runner(language, dtype="bfloat16")
    named = dict(runner.model.backbone.named_parameters())
    assert {p.dtype for p in named.values()} == {torch.bfloat16}
    for name, buffer in runner.model.backbone.named_buffers():
        assert buffer.dtype == torch.float32, name


def test_requests_within_the_limits_are_answered(language):
    """Without a number of tokens too, however few are allowed; and more inputs than may wait are too many."""
    limits = Limits(tokens=3, queue=2)
    runner = open_runner(language, limits=limits)
    with client(runner, limits) as ask:
        body = {"model": "one", "prompt": "w1"}
        found = ask.post("/v1/completions", json=body)
        assert found.status_code == 200
        assert found.json()["usage"]["completion_tokens"] <= 3
        body["prompt"] = prompts(3)
        found = ask.post("/v1/completions", json=body)
        assert found.status_code == 400 and "at most 2" in found.text


def test_what_cannot_be_served_is_said_before_it_is(images, language, tmp_path):
    with pytest.raises(SettingsError, match="answers with vectors"):
        open_runner(images)
    with pytest.raises(SettingsError, match="needs none"):
        open_runner(language, heads="x")
    save_file({"one": torch.ones(2, 32)}, tmp_path / "heads")
    with pytest.raises(
        CheckpointMismatchError, match=r"\(2, 32\) for 'one' and names 0 classes"
    ):
        open_runner(images, heads=tmp_path / "heads")
    plain = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(language.parent / "base").save_pretrained(plain)
    with pytest.raises(CheckpointMismatchError, match="no Tokenizer"):
        open_runner(language, base=str(plain))


def test_the_command_listens_at_this_machine_alone(language, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra fusion-bench-didi[serve]")  # fmt: skip
    asked = []

    def run(server, sockets):
        asked.extend(one.getsockname() for one in sockets)
        for one in sockets:
            one.close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    command = ["serve", str(language), "-s", "tokens=4", "--port", "0"]
    found = CliRunner().invoke(didi, command)
    assert found.exit_code == 0, found.output
    ((host, port),) = asked
    assert host == "127.0.0.1" and "3 tasks at" in found.output
    assert f":{port}/v1/models" in found.output and port != 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        there = str(taken.getsockname()[1])
        found = CliRunner().invoke(didi, ["serve", str(language), "--port", there])
    assert found.exit_code == 2 and "Give another --port" in found.output
    found = CliRunner().invoke(didi, ["serve", str(language), "-s", "colour=4"])
    assert found.exit_code == 2 and "no limit colour" in found.output


def test_the_command_says_what_it_needs(language, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = CliRunner().invoke(didi, ["serve", str(language)])
    assert found.exit_code == 2 and "fusion-bench-didi[serve]" in found.output
