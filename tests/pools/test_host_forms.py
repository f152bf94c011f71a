"""Pools of the host's first version, and entries that leave out what the pool already says."""

import copy

import pytest
import torch
from exact_models import llama, pool_of, t5
from fusion_bench.compat.modelpool import DictModelPool, to_modelpool
from fusion_bench.modelpool import BaseModelPool, CausalLMPool, Seq2SeqLMPool
from helpers import BASE, didi, floats, same_bits
from omegaconf import OmegaConf

from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.pools.host_forms import as_pool


def test_pools_of_modules_of_the_first_version():
    models = pool_of(llama())
    old = DictModelPool(models)
    assert as_pool(old) is old and isinstance(old, BaseModelPool)
    assert old.model_names == ["a", "b"] and old.has_pretrained
    merged, expected = didi(as_pool(old), budget=0.5), didi(models, budget=0.5)
    for task in "ab":
        found = floats(merged.materialize(task))
        assert same_bits(found, floats(expected.materialize(task)))
    listed = to_modelpool(list(models.values()), has_pretraned=True)
    assert didi(as_pool(listed), budget=0.5).tasks == ["model_0", "model_1"]


def test_modules_within_a_configuration_are_taken():
    """Of a pool that has to be changed: what ``torch.compile`` wrapped is unwrapped, which no configuration can hold."""
    models = {name: torch.compile(m) for name, m in pool_of(llama()).items()}
    pool = BaseModelPool({})
    pool._models = OmegaConf.create(models, flags={"allow_objects": True})
    assert didi(as_pool(pool), budget=0.5).tasks == ["a", "b"]


def test_a_pool_of_the_first_version_saves_what_was_merged(tmp_path):
    old = DictModelPool(pool_of(llama()))
    model = DiDiMerging(budget=0.5).run(old)
    old.save_model(model, str(tmp_path / "merged"))  # as the host's program would
    assert (tmp_path / "merged" / "config.json").is_file()
    assert as_pool(as_pool(old)) is old


@pytest.mark.parametrize("entry", ["text", "mapping"])
def test_entries_without_a_class_are_of_the_class_of_their_pool(entry, tmp_path):
    models = pool_of(t5())
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    place = "pretrained_model_name_or_path"
    given = {
        n: str(tmp_path / n) if entry == "text" else {place: str(tmp_path / n)}
        for n in models
    }
    config = OmegaConf.create(given)
    pool = as_pool(Seq2SeqLMPool(config, tokenizer=None))
    assert type(pool.load_model("a")) is type(models["a"])
    assert config == given, "whoever gave the configuration keeps it"


def test_whole_entries_are_left_alone(tmp_path):
    target = "transformers.LlamaForCausalLM.from_pretrained"
    entry = {"_target_": target, "pretrained_model_name_or_path": "there"}
    pool = CausalLMPool({BASE: entry, "a": "elsewhere"}, tokenizer=None)
    models = pool._models
    assert as_pool(pool)._models is models


class Scaled(BaseModelPool):
    """A pool of the user's own, which makes something else of what lies in the files."""

    def load_model(self, name, *args, **kwargs):
        model = copy.deepcopy(super().load_model(name, *args, **kwargs))
        if name != BASE:
            with torch.no_grad():
                [tensor.mul_(1.5) for tensor in model.parameters()]
        return model


def patched(entries):
    pool = BaseModelPool(entries)
    pool.load_model = Scaled(entries).load_model
    return pool


@pytest.mark.parametrize("make", [Scaled, patched])
@pytest.mark.parametrize("form", ["files", "modules"])
def test_a_pool_that_loads_by_itself_is_merged_as_it_loads(
    tiny_clip, tiny_clip_dir, make, form
):
    entries = tiny_clip.pool_models()
    if form == "files":
        target = "transformers.CLIPVisionModel.from_pretrained"
        place = "pretrained_model_name_or_path"
        entries = {
            n: {"_target_": target, place: str(tiny_clip_dir / n)} for n in entries
        }
    pool = make(entries)
    merged = didi(pool, budget=float("inf"))
    for task in merged.tasks:
        found, right = (floats(m) for m in (merged.materialize(task), pool.load_model(task)))  # fmt: skip
        assert all(torch.allclose(found[n], right[n], atol=1e-5) for n in right)
