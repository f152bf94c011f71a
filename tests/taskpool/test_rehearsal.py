"""Rehearsals: with ``fast_dev_run=true`` of the program every pool evaluates one batch per task, or is refused."""

import json
from types import SimpleNamespace

import pytest
from exact_models import bert, llama
from fusion_bench.constants import RuntimeConstants
from fusion_bench.taskpool import OpenCLIPVisionModelTaskPool
from fusion_bench.utils import instantiate
from helpers import REPOSITORY, pictures
from host_pools import tokenizer
from omegaconf import OmegaConf
from pandas import DataFrame

from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.taskpool import (
    MixedStreamCLIPVisionModelTaskPool,
    PerplexityTaskPool,
    TaskAwareOpenCLIPVisionModelTaskPool,
    TextClassificationTaskPool,
    attach,
)
from fusion_bench_didi.taskpool.rehearsal import check_rehearsal


@pytest.fixture(params=[True, False], ids=["rehearsal", "whole"])
def rehearsal(request, monkeypatch) -> bool:
    monkeypatch.setattr(RuntimeConstants, "debug", request.param)
    return request.param


def text_pool(place, **kwargs):
    (place / "a").mkdir()
    rows = {"text": ["ab", "bc", "cd", "de"], "label": [0, 1, 0, 1]}
    DataFrame(rows).to_parquet(place / "a" / "test-00000.parquet")
    return TextClassificationTaskPool(str(place), tokenizer(), batch_size=1, **kwargs)


def perplexity_pool(place, **kwargs):
    (place / "a.txt").write_text("abcdefgh")
    files = {"a": str(place / "a.txt")}
    return PerplexityTaskPool(files, tokenizer(), batch_size=1, context=2, **kwargs)


@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("make, model", [(text_pool, bert), (perplexity_pool, llama)])
def test_texts_are_one_batch_per_task(make, model, own, rehearsal, tmp_path):
    """A pool's own setting comes first."""
    pool = make(tmp_path, fast_dev_run=own)
    pool.evaluate(model() if model is llama else model(2))
    assert len(pool._made["a"]) == (1 if (rehearsal if own is None else own) else 4)


@pytest.mark.parametrize("name", ["demo", "mixed", "text", "perplexity"])
def test_yaml_leaves_it_to_the_program(name):
    config = REPOSITORY / "config" / "taskpool" / "didi" / f"{name}.yaml"
    assert OmegaConf.load(config).get("fast_dev_run") is None


def test_the_demo_is_asked_by_its_yaml(rehearsal, demo_suite):
    config = OmegaConf.load(REPOSITORY / "config" / "taskpool" / "didi" / "demo.yaml")
    pool = instantiate(OmegaConf.merge(config, demo_suite))
    assert pool.fast_dev_run is rehearsal


def test_every_task_is_in_the_one_mixed_batch(tiny_clip, clip_dir):
    def scores(**kwargs):
        pool = MixedStreamCLIPVisionModelTaskPool(
            test_datasets={t: pictures(i, 6) for i, t in enumerate(tiny_clip.tasks)},
            **dict.fromkeys(("processor", "clip_model"), str(clip_dir)),
            stream_batch_size=7,
            **kwargs,
        )
        report = pool.evaluate(tiny_clip.base)
        return {t: report[t]["accuracy"] for t in tiny_clip.tasks}

    assert scores(fast_dev_run=True) == scores(limit=7 // len(tiny_clip.tasks))
    assert scores(fast_dev_run=True, limit=1) == scores(limit=1)


def test_openclip_asks_the_program(rehearsal):
    given = {"test_datasets": {}, "classification_heads": {}, "dataloader_kwargs": {}}
    pool = TaskAwareOpenCLIPVisionModelTaskPool(**given)
    assert pool.fast_dev_run is rehearsal
    stock = OpenCLIPVisionModelTaskPool(**given)
    check_rehearsal(pool, given)
    if not rehearsal:
        check_rehearsal(stock, given)
        return
    told = "OpenCLIPVisionModelTaskPool would .*, or set .*taskpool.fast_dev_run=true"
    with pytest.raises(SettingsError, match=told):
        check_rehearsal(stock, given)
    stock.fast_dev_run = True
    check_rehearsal(stock, given)


def test_a_pool_without_such_a_mode_is_refused(rehearsal):
    class ResNetForImageClassificationTaskPool:
        """Asks the program."""

    check_rehearsal(ResNetForImageClassificationTaskPool(), {})
    check_rehearsal(SimpleNamespace(), {"fast_dev_run": True})  # reads its YAML
    if rehearsal:
        with pytest.raises(SettingsError, match=r"everything\. Leave [a-z_ ]+ out\."):
            check_rehearsal(SimpleNamespace(), {})


def test_lm_eval_is_limited_to_a_batch(rehearsal, tmp_path):
    class LMEvalHarnessTaskPool:
        tasks, batch_size, output_path = ["a", "b"], 3, str(tmp_path)
        log_dir = _program = None

        def evaluate(self, model, **kwargs):
            limits.append(kwargs.get("limit"))
            place = tmp_path / self.tasks[0]
            place.mkdir()
            results = json.dumps({"results": {self.tasks[0]: {"acc,none": 0.5}}})
            (place / "results_1.json").write_text(results)

    limits, pool = [], LMEvalHarnessTaskPool()
    attach(pool)
    check_rehearsal(pool, {})
    assert pool.evaluate(llama())["average"] == {"figure": 0.5}
    assert limits == [3 if rehearsal else None] * 2
