"""Text tasks: accuracy and perplexity are those of each task's own model, in the layout of the host's CLIP pools."""

import inspect
import json
import math

import pandas as pd
import pytest
import torch
from exact_models import bert, exact_model, llama, pool_of
from fusion_bench.utils import instantiate
from helpers import BASE, REPOSITORY, didi
from host_pools import tokenizer
from omegaconf import OmegaConf
from torch import nn

from fusion_bench_didi.errors import DiDiError, UnknownTaskError
from fusion_bench_didi.programs.scoring import Scorer
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.taskpool import PerplexityTaskPool, TextClassificationTaskPool

CLASSES = {"a": 3, "b": 5}


def letters(seed: int, count: int) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 20, (count,), generator=g).tolist()
    return ["".join(chr(33 + int(i)) for i in torch.randint(60, (n,), generator=g)) for n in sizes]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for seed, (task, classes) in enumerate(CLASSES.items()):
        (root / task).mkdir()
        rows = {"text": letters(seed, 23), "label": [i % classes for i in range(23)]}
        for split in ("validation", "test"):
            pd.DataFrame(rows).to_parquet(root / task / f"{split}-00000.parquet")
        (root / f"{task}.txt").write_text("".join(letters(seed + 7, 30)))
    return root


def classifiers() -> dict[str, nn.Module]:
    """Encoders far apart, heads of their own sizes."""
    models = pool_of(bert(2).bert, tuple(CLASSES))
    found = {BASE: bert(2)}
    for task, classes in CLASSES.items():
        found[task] = bert(classes)
        found[task].bert = models[task]
        with torch.no_grad():
            found[task].classifier.weight.mul_(20)
    return found


def accuracy_by_hand(model: nn.Module, data, task: str) -> tuple[float, float]:
    """One text at a time."""
    rows, tok = pd.read_parquet(data / task / "test-00000.parquet"), tokenizer()
    right, loss = 0, 0.0
    for text, label in zip(rows["text"], rows["label"]):
        with torch.no_grad():
            logits = model(**tok(text, return_tensors="pt")).logits[0]
        right += int(logits.argmax()) == label
        loss -= float(logits.log_softmax(0)[label])
    return right / len(rows), loss / len(rows)


def test_classifiers_with_heads_of_their_own(data):
    models = classifiers()
    pool = TextClassificationTaskPool(str(data), tokenizer(), tasks=list(CLASSES), batch_size=4)  # fmt: skip
    report = pool.evaluate(didi(models, budget=1e9))
    for task in CLASSES:
        right, loss = accuracy_by_hand(models[task].eval(), data, task)
        assert report[task]["accuracy"] == pytest.approx(right)
        assert report[task]["loss"] == pytest.approx(loss, abs=1e-3)
    assert report["average"]["accuracy"] == pytest.approx(sum(report[t]["accuracy"] for t in CLASSES) / 2)  # fmt: skip
    assert report["didi"]["storage"]["x_excl"] > 0
    assert {"trainable_params", "all_params"} <= set(report["model_info"])
    json.dumps(report)


def test_encoders_with_the_heads_of_the_pool(data, tmp_path):
    """Static merges, too: what is merged has no head."""
    models = classifiers()
    for task in CLASSES:
        models[task].save_pretrained(tmp_path / task)
    pool = TextClassificationTaskPool(
        str(data),
        tokenizer(),
        tasks=list(CLASSES),
        heads={task: str(tmp_path / task) for task in CLASSES},
    )
    encoders = {name: model.bert for name, model in models.items()}
    merged = exact_model(encoders)
    dynamic, scorer = pool.evaluate(merged), Scorer(pool)
    for task in CLASSES:
        right, loss = accuracy_by_hand(models[task].eval(), data, task)
        assert dynamic[task]["loss"] == pytest.approx(loss, abs=1e-3)
        assert scorer.score(encoders[task], task) == pytest.approx(right)
        assert scorer.score(merged, task) == pytest.approx(right)
    assert pool.evaluate(encoders["a"])["b"]["loss"] != pytest.approx(dynamic["b"]["loss"], abs=1e-2)  # fmt: skip
    assert all(type(shell.bert) is nn.Identity for shell in pool._shells.values())


def test_perplexity_is_that_of_each_tasks_own_model(data):
    models, tok = pool_of(llama(), ("a", "b")), tokenizer()
    pool = PerplexityTaskPool(
        {task: str(data / f"{task}.txt") for task in ("a", "b")},
        tok,
        context=16,
        batch_size=3,
        limit=103,
    )
    report = pool.evaluate(exact_model(models))
    for task in ("a", "b"):
        ids = tok((data / f"{task}.txt").read_text())["input_ids"][:103]
        loss = right = count = 0.0
        for start in range(0, 103, 16):
            window = torch.tensor(ids[start : start + 16])
            with torch.no_grad():
                logits = models[task](window[None]).logits[0, :-1]
            scores = logits.log_softmax(-1)
            loss -= float(scores.gather(1, window[1:, None]).sum())
            right += float((logits.argmax(-1) == window[1:]).sum())
            count += len(window) - 1
        assert report[task]["loss"] == pytest.approx(loss / count, abs=1e-4)
        assert report[task]["accuracy"] == pytest.approx(right / count)
        assert report[task]["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-3)  # fmt: skip
    assert report["a"]["loss"] != report["b"]["loss"]


def test_a_model_that_knows_no_task_is_refused_and_so_are_tasks_that_it_lacks(data):
    pool = PerplexityTaskPool({"c": str(data / "a.txt")}, tokenizer())
    with pytest.raises(UnknownTaskError, match=r"covers: \['c'\]"):
        pool.evaluate(exact_model(pool_of(llama())))
    aliased = PerplexityTaskPool({"c": str(data / "a.txt")}, tokenizer(), task_aliases={"c": "b"})  # fmt: skip
    named = PerplexityTaskPool({"b": str(data / "a.txt")}, tokenizer())
    model = exact_model(pool_of(llama()))
    assert aliased.evaluate(model)["c"] == named.evaluate(model)["b"]


def test_what_cannot_be_measured_is_said(data, tmp_path):
    with pytest.raises(DiDiError, match="names no task"):
        PerplexityTaskPool({}, tokenizer())
    pool = PerplexityTaskPool({"a": str(data / "a.txt")}, tokenizer())
    model = exact_model(pool_of(llama()))
    pool.logits = lambda *_: torch.eye(63)[torch.zeros(1, 3, dtype=torch.long)] * 1e4
    pool._made["a"] = [({}, torch.tensor([[1, 2, 3]]))]
    assert pool.evaluate(model)["a"]["perplexity"] == math.inf
    pool._made["a"] = [({}, torch.tensor([[-1, -1, -1]]))]
    with pytest.raises(DiDiError, match="'?a'? has no labeled sample"):
        pool.evaluate(model)


def test_a_router_finds_the_tasks_of_texts(data):
    """The same for a text alone and in a batch that pads it."""
    models = pool_of(llama(), ("a", "b"))
    model = exact_model(models)
    model.attach_router(make_router("projection", ["a", "b"], directions=4))
    files = {task: str(data / f"{task}.txt") for task in ("a", "b")}
    report = PerplexityTaskPool(files, tokenizer(), context=16).evaluate(model)
    assert report["didi"]["router"]["samples"] > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"split": "train"}, r"holds no train-\*.parquet for \['a', 'b'\]"),
        ({"tasks": ["a", "x"]}, r"for \['x'\]; there are \['a', 'b'\]"),
        ({"heads": {"a": "somewhere"}}, r"heads has none for \['b'\]"),
        ({"limit": 0}, "limit=0"),
        ({"batchsize": 3}, "no setting batchsize"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, data):
    with pytest.raises(DiDiError, match=message):
        TextClassificationTaskPool(str(data), tokenizer(), **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"files": {"a": "nowhere/*.txt"}}, "files.a: nothing is there"),
        ({"context": 1}, "context=1"),
    ],
)
def test_text_files_that_cannot_be_are_refused(settings, message, data):
    given = {"files": {"a": str(data / "a.txt")}, **settings}
    with pytest.raises(DiDiError, match=message):
        PerplexityTaskPool(tokenizer=tokenizer(), **given)


@pytest.mark.parametrize(
    "name, given",
    [("text", {"root": "", "tasks": ["a"]}), ("perplexity", {"files": {"a": "a.txt"}})],
)
def test_yaml_makes_the_pool(name, given, data, tmp_path):
    """Every key is a setting, every setting a key."""
    config = OmegaConf.load(REPOSITORY / "config" / "taskpool" / "didi" / f"{name}.yaml")  # fmt: skip
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    settings = {"tokenizer": str(tmp_path / "tokenizer")}
    for key, value in given.items():
        settings[key] = str(data) if key == "root" else value
    if "files" in settings:
        settings["files"] = {"a": str(data / "a.txt")}
    pool = instantiate(OmegaConf.merge(config, settings))
    model = classifiers()["a"] if name == "text" else llama()
    assert 0 <= pool.evaluate(model.eval())["a"]["accuracy"] <= 1
    known = {
        key
        for cls in type(pool).__mro__
        if cls.__module__.startswith("fusion_bench_didi")
        for key, p in inspect.signature(cls.__init__).parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and key != "self"
    }
    assert set(config) - {"_target_"} == known
