"""CLIP towers with and without ``vision_model.`` in front of their names are the same towers."""

from types import SimpleNamespace

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool, CLIPVisionModelPool
from fuzz_cases import CASES, body
from helpers import QUICK, floats, same_bits
from safetensors.torch import save_file
from shared_forms import base, model_of
from torch import nn

from fusion_bench_didi.artifacts.saving import load
from fusion_bench_didi.editing import AdapterLibrary, combine, load_tasks
from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel
from fusion_bench_didi.pools.entries import load_model
from fusion_bench_didi.routers.capture import layer_names
from fusion_bench_didi.task_vectors.tower_names import PREFIX, spelling

SPELLINGS = pytest.mark.parametrize("prefix", ["", PREFIX], ids=["without", "with"])


class Prefixed(nn.Module):
    """A tower under the names that transformers 4 gives it."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.vision_model = tower

    def forward(self, *args, **kwargs):
        return self.vision_model(*args, **kwargs)


def spelled(model: nn.Module, prefix: str) -> nn.Module:
    """A tower of either transformers as one of the generation asked for."""
    tower = getattr(model, "vision_model", model)
    return Prefixed(tower) if prefix else tower


def plain(state: dict) -> dict:
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def write(models: dict, directory, prefix: str) -> dict[str, str]:
    """One ``from_pretrained`` directory per model."""
    for name, model in models.items():
        model.config.save_pretrained(directory / name)
        state = {prefix + n: v for n, v in plain(model.state_dict()).items()}
        file = directory / name / "model.safetensors"
        save_file(state, file, metadata={"format": "pt"})
    return {name: str(directory / name) for name in models}


@pytest.mark.parametrize(
    "names, there, expected",
    [
        (["a.b"], ["a.b", "c"], ["a.b"]),
        (["a"], [PREFIX + "a"], [PREFIX + "a"]),
        ([PREFIX + "a"], ["a"], ["a"]),
        (["a", "b"], [PREFIX + "a"], ["a", "b"]),
    ],
)
def test_names_are_respelled_only_if_all_of_them_meet(names, there, expected):
    model = SimpleNamespace(state_dict=lambda: dict.fromkeys(there), named_buffers=dict)
    assert [*map(spelling(names, model), names)] == expected


@SPELLINGS
def test_a_pool_reads_both(tiny_clip, tmp_path, prefix):
    models = tiny_clip.pool_models()
    pool = CLIPVisionModelPool(write(models, tmp_path, prefix))
    for name, model in models.items():
        assert same_bits(load_model(pool, name).state_dict(), model.state_dict())


@SPELLINGS
def test_a_merge_of_files_in_either_spelling_comes_back(tiny_clip, tmp_path, prefix):
    models = tiny_clip.pool_models()
    pool = CLIPVisionModelPool(write(models, tmp_path / "models", prefix))
    DiDiMerging(budget=9.0, **QUICK).run(pool).save_pretrained(tmp_path / "merged")
    model = DiDiModel.from_pretrained(tmp_path / "merged")
    for task in tiny_clip.tasks:
        found, expected = model.materialize(task), models[task]
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value)


@SPELLINGS
def test_saved_models_are_read_by_the_other_generation(tiny_clip, tmp_path, prefix):
    models = {n: spelled(m, prefix) for n, m in tiny_clip.pool_models().items()}
    model = DiDiMerging(budget=1.0, **QUICK).run(BaseModelPool(models))
    model.save_pretrained(tmp_path / "merged")
    backbone = spelled(tiny_clip.base, "" if prefix else PREFIX)
    other = DiDiModel.from_pretrained(tmp_path / "merged", backbone)
    assert {n.startswith(PREFIX) for n in other.touched} == {not prefix}
    assert other.storage.x_excl == model.storage.x_excl
    for task in tiny_clip.tasks:
        found, expected = (m.materialize(task).state_dict() for m in (other, model))
        assert same_bits(plain(found), plain(expected))
    other.save_pretrained(tmp_path / "again")
    again = DiDiModel.from_pretrained(tmp_path / "again", spelled(backbone, prefix))
    assert again.touched == model.touched


KINDS = ("model", "modules", "individuals", "static", "smile", "wemoe")


def tensors(model) -> dict[str, dict]:
    """Of every task, under names without the prefix; under the one name ``""`` where a model is of all tasks."""
    if isinstance(model, dict):
        return {task: plain(floats(one)) for task, one in model.items()}
    if not isinstance(model, DynamicModel):
        return {"": plain(floats(model))}
    return {task: plain(floats(model.materialize(task))) for task in model.tasks}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[t], other[t]) for t in one)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_saved_is_read_by_the_other_generation(kind, tmp_path):
    CASES[kind].write(tmp_path / "saved")
    found, expected = (
        tensors(load(tmp_path / "saved", base)) for base in (Prefixed(body()), body())
    )
    assert same(found, expected)


@pytest.mark.parametrize("way", ["load", "load_tasks", "library"])
@pytest.mark.parametrize("taken_off", [True, False])
def test_tasks_with_what_only_a_group_shares_are_read_too(way, taken_off, tmp_path):
    one, other = model_of("dense", 0, "abc"), model_of("low rank", 100, "xyz")
    both, here = combine(one, other).model, base()
    expected = tensors(both)
    if taken_off:
        both.save_pretrained(tmp_path / "first")
        both, here = load(tmp_path / "first", Prefixed(base())), base()
    else:
        here = Prefixed(here)
    if way == "library":
        library = AdapterLibrary(tmp_path / "library")
        library.add(both)
        found = library.load([*"abcxyz"], here)
    else:
        both.save_pretrained(tmp_path / "saved")
        if way == "load":
            found = load(tmp_path / "saved", here)
        else:
            found = load_tasks(tmp_path / "saved", [*"abcxyz"], here)
    assert same(tensors(found), expected)


def saved_as_prefixed(model: DynamicModel, home) -> str:
    """A saved model under the names that the other generation gives it, whose class is called the same."""
    known = {"class": "CLIPVisionModel", "source": None}
    model.info["backbone"] = known
    model.save_pretrained(home / "plain")
    other = load(home / "plain", Prefixed(base()))
    other.info["backbone"] = known
    other.save_pretrained(home / "prefixed")
    assert {name.startswith(PREFIX) for name in other.touched} == {True}
    return str(home / "prefixed")


@pytest.mark.parametrize("first", ["plain", "prefixed"])
def test_two_spellings_are_combined_in_that_of_the_first(first, tmp_path):
    one, other = (
        model_of(f, s, t) for f, s, t in [("dense", 0, "abc"), ("low rank", 100, "xyz")]
    )
    second = saved_as_prefixed(other, tmp_path)
    one.info["backbone"] = other.info["backbone"]
    one.save_pretrained(tmp_path / "one")
    expected = {**tensors(one), **tensors(other)}
    places = [tmp_path / "one", second]
    combine(*places[:: 1 if first == "plain" else -1], output_dir=tmp_path / "both")
    assert same(tensors(load(tmp_path / "both", base())), expected)


def test_a_library_takes_tasks_in_either_spelling(tmp_path):
    one, other = (
        model_of(f, s, t) for f, s, t in [("dense", 0, "abc"), ("low rank", 100, "xyz")]
    )
    second = saved_as_prefixed(other, tmp_path)
    one.info["backbone"] = other.info["backbone"]
    library = AdapterLibrary(tmp_path / "library")
    library.add(one)
    library.add(second)
    found = library.load([*"abcxyz"], base())
    assert same(tensors(found), {**tensors(one), **tensors(other)})


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(
    "pattern", ["encoder.layers.0", "encoder.layers.?", "vision_model.encoder.layers.0"]
)
def test_routers_find_layers_in_either_spelling(tiny_clip, prefix, pattern):
    found = layer_names(spelled(tiny_clip.base, prefix), [pattern])
    assert found == layer_names(
        spelled(tiny_clip.base, prefix), [*range(2 if "?" in pattern else 1)]
    )


def test_another_backbone_is_still_refused(tiny_clip, make_tiny_clip, tmp_path):
    models = {n: spelled(m, PREFIX) for n, m in tiny_clip.pool_models().items()}
    model = DiDiMerging(budget=1.0, **QUICK).run(BaseModelPool(models))
    model.save_pretrained(tmp_path / "merged")
    other = spelled(make_tiny_clip(seed=7).base, "")
    with pytest.raises(CheckpointMismatchError, match="its weights differ"):
        DiDiModel.from_pretrained(tmp_path / "merged", other)
