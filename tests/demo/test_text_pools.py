"""A folder of text models: encoders are merged, heads stay with their tasks; methods that look at inputs take texts."""

import pandas as pd
import pytest
import torch
from exact_models import bert, exact_model, pool_of, tokens
from helpers import BASE, QUICK
from host_pools import tokenizer
from omegaconf import OmegaConf

from fusion_bench_didi.demo.text_pools import FolderTextModelPool, FolderTextTaskPool
from fusion_bench_didi.errors import ModelPoolError
from fusion_bench_didi.method.baselines.cat import CATMerging, record_inputs
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.method.routed import RoutedMethod
from fusion_bench_didi.pools.inputs import load_inputs, parts
from fusion_bench_didi.programs.compare import ComparisonProgram
from fusion_bench_didi.routers.files import make_router

TASKS = {"a": 3, "b": 5}
# a letter range of their own, so that texts tell their task
LETTERS = {"a": range(33, 50), "b": range(60, 90)}


def text(task: str, seed: int) -> str:
    g = torch.Generator().manual_seed(seed)
    of = LETTERS[task]
    picks = torch.randint(len(of), (3 + seed % 17,), generator=g).tolist()
    return "".join(chr(of[i]) for i in picks)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    encoders = pool_of(bert().bert, tuple(TASKS))
    encoders[BASE].save_pretrained(root / "models" / BASE)
    tokenizer().save_pretrained(root / "models" / BASE)
    for seed, (task, classes) in enumerate(TASKS.items()):
        model = bert(classes)
        model.bert = encoders[task]
        model.save_pretrained(root / "models" / task)
        (root / "data" / task).mkdir(parents=True)
        for i, split in enumerate(("train", "validation", "test")):
            texts = [text(task, 100 * i + n) for n in range(30)]
            rows = {"text": texts, "label": [n % classes for n in range(30)]}
            pd.DataFrame(rows).to_parquet(root / "data" / task / f"{split}-0.parquet")
    return {"root": str(root / "models"), "data": str(root / "data")}


def test_encoders_are_merged_and_scored_with_their_heads(suite):
    pool, taskpool = FolderTextModelPool(**suite), FolderTextTaskPool(**suite)
    assert pool.model_names == ["a", "b"]
    model = DiDiMerging(budget=1e9, **QUICK).run(pool)
    assert not [name for name in model.touched if "classifier" in name]
    report = taskpool.evaluate(model)
    for task in TASKS:
        own = taskpool.evaluate(pool.load_model(task))[task]
        assert report[task]["loss"] == pytest.approx(own["loss"], abs=1e-4)


def test_tasks_that_are_not_there_are_refused(suite):
    with pytest.raises(ModelPoolError, match=r"no model for \['c'\]"):
        FolderTextModelPool(**suite, tasks=["a", "c"])


def test_texts_come_from_the_training_data(suite):
    pool = FolderTextModelPool(**suite)
    found = load_inputs(pool, "b", 8, seed=1)
    there = {text("b", n) for n in range(30)}
    back = tokenizer().batch_decode(found["input_ids"], skip_special_tokens=True)
    assert {t.replace(" ", "") for t in back} <= there and len(back) == 8
    assert load_inputs(pool, "b", 99, seed=1)["input_ids"].shape[0] == 30
    for (args, named), count in zip(parts(found, 3), (3, 3, 2)):
        assert not args and len(named["input_ids"]) == count
        assert named["attention_mask"].any(0).all(), "nothing that is padding for all"
    whole = torch.cat([named["attention_mask"].sum(1) for _, named in parts(found, 3)])
    assert whole.equal(found["attention_mask"].sum(1))


@pytest.mark.parametrize("router", ["projection", "representation", "mlp"])
@pytest.mark.parametrize("pooling", ["mean", "both", "cls"])
def test_padding_changes_no_features(router, pooling):
    options = {"directions": 4} if router == "projection" else {"pooling": pooling}
    if (router, pooling) == ("representation", "both"):
        options = {"pooling": "mean", "layers": ["embeddings"]}
    model = exact_model(pool_of(bert().bert))
    model.attach_router(make_router(router, model.tasks, **options))
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    alone = model.router.features(model, input_ids=ids[:1, :5], attention_mask=mask[:1, :5])  # fmt: skip
    found = model.router.features(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found[:1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("router", ["mlp", "projection"])
def test_a_router_with_a_head_learns_the_tasks_of_texts(router, suite):
    pool, taskpool = FolderTextModelPool(**suite), FolderTextTaskPool(**suite)
    method = RoutedMethod(DiDiMerging(budget=1e9, **QUICK), router=router, head="discriminant")  # fmt: skip
    model = method.run(pool)
    report = taskpool.evaluate(model)
    told = DiDiMerging(budget=1e9, **QUICK).run(pool)
    for task in TASKS:
        own = taskpool.evaluate(told)[task]["accuracy"]
        assert report[task]["accuracy"] == pytest.approx(own, abs=0.1)


def test_inputs_of_layers_hold_no_padding(suite):
    pool = FolderTextModelPool(**suite)
    inputs = load_inputs(pool, "a", 4, seed=0)
    found = record_inputs(pool.load_model("a"), inputs)
    rows = found["encoder.layer.0.attention.self.query.weight"]
    assert len(rows) == int(inputs["attention_mask"].sum())
    merged = CATMerging(images=2).run(pool)
    assert type(merged).__name__ == "BertModel"


def test_a_comparison_runs_on_text(suite, tmp_path):
    home = "fusion_bench_didi.demo.text_pools.FolderText"
    entries = {
        "individuals": {"method": "individuals", "group": "reference"},
        "averaging": {"method": "simple_average", "group": "static"},
        "didi": {"method": "didi", "overrides": {"budget": 1.9}, "group": "dynamic"},
    }
    program = ComparisonProgram(
        entries=OmegaConf.create(entries),
        modelpool=OmegaConf.create({"_target_": f"{home}ModelPool", **suite}),
        taskpool=OmegaConf.create({"_target_": f"{home}TaskPool", **suite}),
        path=OmegaConf.create({"log_dir": str(tmp_path)}),
        save_artifacts=True,
        report=False,
        seed=0,
    )
    own, averaged, kept = program.run()["rows"]
    assert not own["error"] and not averaged["error"] and not kept["error"]
    assert kept["x_excl"] <= 1.9 and averaged["x_excl"] == 1
    assert kept["accuracy"].keys() == TASKS.keys()
    assert kept["average"] == pytest.approx(own["average"], abs=0.1)
