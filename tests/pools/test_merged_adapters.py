"""Models of adapters: plain modules of the base model, made when they are asked for."""

import copy
import functools

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool, CLIPVisionModelPool
from helpers import BASE, didi, floats, same_bits
from lora_families import (
    ATTENTION,
    TASKS,
    assert_close,
    change_tensors,
    clip,
    family,
    llamas,
    pool_of,
    write_adapter,
)
from transformers import CLIPConfig, CLIPForImageClassification

from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.pools.merged_adapters import adapted

# PEFT on what it saves beside the adapter, and on layouts that it corrects itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def test_no_fine_tuned_model_is_instantiated(llamas, monkeypatch):
    _, models, pool = llamas
    stock = pool.load_model

    @functools.wraps(stock)
    def load(name, *args, **kwargs):
        assert name == BASE, f"{name} was instantiated"
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(pool, "load_model", load)
    assert_close(didi(pool, budget=1.4), models)


def test_adapters_around_a_base_model_in_memory(llamas):
    directory, models, _ = llamas
    entries = {BASE: models[BASE], **{t: str(directory / t) for t in TASKS}}
    assert_close(didi(entries, budget=1.4), models)


def test_prefix_of_the_base_models_names_may_differ(tmp_path):
    """An adapter of the bare tower, whose names lack the prefix that the pool's class has."""
    models = family(tmp_path, clip, target_modules=ATTENTION)
    for task in TASKS:
        change_tensors(
            tmp_path / task,
            lambda t: [
                t.update({n.replace("model.vision_model.", "model."): t.pop(n)})
                for n in list(t)
            ],
        )
    assert_close(didi(pool_of(tmp_path, models[BASE]), budget=1.4), models)


def test_a_module_of_another_size_is_no_part_of_a_whole_model(tmp_path):
    """Where each task may keep its own, as a classifier of other classes."""

    def classifier(classes: int = 3):
        tower = clip().config.to_dict()
        return CLIPForImageClassification(CLIPConfig(vision_config=tower, num_labels=classes))  # fmt: skip

    models = family(tmp_path, classifier, tasks=("a",), target_modules=ATTENTION)
    config = {"target_modules": ATTENTION, "modules_to_save": ["classifier"]}
    write_adapter(classifier(5), tmp_path / "b", 2, **config)
    entries = {BASE: models[BASE], "a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    pool = adapted(BaseModelPool(entries))
    pool.load_model("a")
    with pytest.raises(CheckpointMismatchError, match=r"b: classifier.* is \(5"):
        pool.load_model("b")


def test_models_of_adapters_are_plain_models(tmp_path):
    """What methods of the host, and those that run the models, ask a pool for."""
    from fusion_bench.method import SimpleAverageAlgorithm

    models = family(tmp_path, clip, target_modules=ATTENTION)
    pool = adapted(pool_of(tmp_path, models[BASE]))
    assert isinstance(pool, CLIPVisionModelPool) and adapted(pool) is pool
    for name, model in pool.named_models():
        for tensor, value in floats(models[name]).items():
            torch.testing.assert_close(floats(model)[tensor], value)
    assert same_bits(floats(pool.load_pretrained_model()), floats(models[BASE]))
    average = floats(SimpleAverageAlgorithm().run(copy.copy(pool)))
    expected = floats(SimpleAverageAlgorithm().run(BaseModelPool(models)))
    for tensor, value in expected.items():
        torch.testing.assert_close(average[tensor], value)
