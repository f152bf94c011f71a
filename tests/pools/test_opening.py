"""Checkpoints are read from files as from models in memory."""

import functools
import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, floats, same_bits
from merged_tasks import assert_task_weights, clip_pool, pool
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, GenerationConfig

from fusion_bench_didi import load
from fusion_bench_didi.checkpoint.deltas import read_config
from fusion_bench_didi.errors import ModelPoolError
from fusion_bench_didi.method import DiDiMerging, EMRMerging
from fusion_bench_didi.pools.entries import check_instantiable, load_model


def test_files_are_read_without_instantiating_fine_tuned_models(
    pool, tiny_clip, monkeypatch
):
    stock = pool.load_model

    @functools.wraps(stock)
    def load(name, *args, **kwargs):
        assert name == BASE, f"{name} was instantiated"
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(pool, "load_model", load)
    model = didi(pool, budget=float("inf"))
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


def test_files_and_live_models_give_equal_bits(pool, tiny_clip):
    one = didi(pool, budget=0.7)
    two = didi(tiny_clip.pool_models(), budget=0.7)
    for task in one.tasks:
        left, right = one.materialize(task), two.materialize(task)
        assert same_bits(floats(left), floats(right))


def rewrite(source, target, change):
    """Copy a directory of models with each file's tensors changed."""
    for model in source.iterdir():
        (target / model.name).mkdir(parents=True)
        config = (model / "config.json").read_text()
        (target / model.name / "config.json").write_text(config)
        tensors = change(model.name, load_file(model / "model.safetensors"))
        file = target / model.name / "model.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_prefix_dropped_in_fine_tuned_files(tiny_clip_dir, tiny_clip, tmp_path):
    def change(name, tensors):
        if name == BASE:
            return tensors
        return {k.removeprefix("vision_model."): v for k, v in tensors.items()}

    directory = rewrite(tiny_clip_dir, tmp_path / "models", change)
    model = didi(clip_pool(directory), budget=float("inf"))
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


@pytest.mark.parametrize("dry_run", [True, False])
def test_base_checkpoint_may_be_a_whole_clip_model(
    dry_run, tiny_clip_dir, tiny_clip, tmp_path, capsys
):
    """The base model of the published pools holds the text tower too, one of ours does as well."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = json.loads((tiny_clip_dir / BASE / "config.json").read_text())
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    others = {
        name: value.contiguous()
        for name, value in whole.state_dict().items()
        if not name.startswith("vision_model.")
    }

    wholes = (BASE,) if dry_run else (BASE, "svhn")

    def change(name, tensors):
        return {**tensors, **others} if name in wholes else tensors

    directory = rewrite(tiny_clip_dir, tmp_path / "models", change)
    whole.config.save_pretrained(directory / BASE)
    model = didi(clip_pool(directory), budget=1e9, dry_run=dry_run)
    if dry_run:
        plan = capsys.readouterr().out
        assert "vision_model.encoder" in plan
        assert "text_model" not in plan and "visual_projection" not in plan
    else:
        assert_task_weights(model, tiny_clip.tuned, atol=1e-6)
        assert not [name for name in model.touched if "text_model" in name]


def test_pickles_are_read_weights_only(tiny_clip_dir, tiny_clip, tmp_path, monkeypatch):
    for model in tiny_clip_dir.iterdir():
        (tmp_path / model.name).mkdir()
        config = (model / "config.json").read_text()
        (tmp_path / model.name / "config.json").write_text(config)
        file = tmp_path / model.name / "pytorch_model.bin"
        torch.save(load_file(model / "model.safetensors"), file)
    pool = clip_pool(tmp_path)
    monkeypatch.setattr(pool, "load_pretrained_model", lambda: tiny_clip.base)
    monkeypatch.setattr(pool, "load_model", None)
    model = didi(pool, budget=float("inf"))
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


def test_sharded_files_are_read(tiny_clip_dir, tiny_clip, tmp_path, monkeypatch):
    from transformers import CLIPVisionModel

    for source in tiny_clip_dir.iterdir():
        model = CLIPVisionModel.from_pretrained(source)
        model.save_pretrained(tmp_path / source.name, max_shard_size="40KB")
        assert (tmp_path / source.name / "model.safetensors.index.json").is_file()
    pool = clip_pool(tmp_path)
    base = pool.load_pretrained_model()
    monkeypatch.setattr(pool, "load_pretrained_model", lambda: base)
    monkeypatch.setattr(pool, "load_model", None)
    model = didi(pool, budget=float("inf"))
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


def entries(directory, **arguments):
    """Entries of plain dictionaries, whose values may be objects."""
    load = {"_target_": "transformers.CLIPVisionModel.from_pretrained", **arguments}
    return {
        name: {**load, "pretrained_model_name_or_path": directory / name}
        for name in (BASE, "mnist", "svhn")
    }


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_types_and_paths_of_entries_are_written_as_text(
    tiny_clip_dir, tmp_path, key, written
):
    given = entries(tiny_clip_dir, **{key: torch.bfloat16})
    where = {"output_dir": str(tmp_path / "m")} if written else {}
    model = didi(BaseModelPool(given), budget=0.5, **where)
    if not written:
        model.save_pretrained(tmp_path / "m")
    source = read_config(tmp_path / "m")["backbone"]["source"]
    assert source[key] == "bfloat16"
    assert source["pretrained_model_name_or_path"] == str(tiny_clip_dir / BASE)
    assert model.info["parents"] == {t: str(tiny_clip_dir / t) for t in model.tasks}
    loaded = load(tmp_path / "m")
    for task in model.tasks:
        one, other = (floats(m.materialize(task)) for m in (loaded, model))
        assert same_bits(one, other)
        assert {v.dtype for v in one.values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", [DiDiMerging, EMRMerging])
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    tiny_clip_dir, monkeypatch, method
):
    settings = GenerationConfig()  # of transformers 5 the host's pool takes no other
    pool = BaseModelPool(entries(tiny_clip_dir, generation_config=settings))
    monkeypatch.setattr(pool, "load_pretrained_model", None)
    with pytest.raises(ModelPoolError, match="generation_config of GenerationConfig"):
        method().run(pool)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_base_model_without_a_configuration_is_refused(pool, dry_run, tmp_path):
    """transformers makes a model of its class's default settings of such a directory, of any size."""
    entries = dict(pool._models)
    shutil.copytree(entries[BASE], tmp_path / BASE)
    (tmp_path / BASE / "config.json").unlink()
    pool._models = {**entries, BASE: str(tmp_path / BASE)}
    with pytest.raises(ModelPoolError, match=f"{tmp_path / BASE} has no config.json"):
        DiDiMerging(dry_run=dry_run).run(pool)


def test_tasks_without_a_configuration_are_read_and_not_instantiated(
    tiny_clip_dir, tiny_clip, tmp_path
):
    shutil.copytree(tiny_clip_dir, tmp_path / "models")
    place = tmp_path / "models" / "svhn"
    (place / "config.json").unlink()
    found = clip_pool(tmp_path / "models")
    assert_task_weights(didi(found, budget=float("inf")), tiny_clip.tuned, atol=1e-6)
    with pytest.raises(ModelPoolError, match=f"svhn: {place} has no config.json"):
        load_model(found, "svhn")


#: What an entry says beside its place, and files there -> whether a class of transformers would be made of default settings.
UNCONFIGURED = {
    "a class of transformers": ({}, (), True),
    "one that is told more": ({"max_position_embeddings": 8}, (), True),
    "a folder": ({"subfolder": "inside"}, ("config.json",), True),
    "a folder that has one": ({"subfolder": "inside"}, ("inside/config.json",), False),
    "a configuration of its own": ({"config": "elsewhere"}, (), False),
    "GGUF": ({"gguf_file": "model.gguf"}, (), False),
    "an adapter": ({}, ("adapter_config.json",), False),
    "the host's class": ({"_target_": "fusion_bench.X.from_pretrained"}, (), False),
    "PEFT's": ({"_target_": "peft.AutoPeftModel.from_pretrained"}, (), False),
    "a name on the hub": ({"pretrained_model_name_or_path": "user/name"}, (), False),
}


@pytest.mark.parametrize("what", UNCONFIGURED)
def test_directories_that_need_a_configuration(what, tmp_path):
    given, files, refused = UNCONFIGURED[what]
    (tmp_path / "inside").mkdir()
    for name in files:
        (tmp_path / name).write_text("{}")
    target = "transformers.CLIPVisionModel.from_pretrained"
    entry = {"_target_": target, "pretrained_model_name_or_path": str(tmp_path)}
    pool = BaseModelPool({BASE: {**entry, **given}})
    expected = pytest.raises(ModelPoolError, match="has no config.json")
    with expected if refused else nullcontext():
        check_instantiable(pool, BASE)
