"""Weights are those that the host's pool would load with its own arguments, and base models are found again by them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from exact_models import llama
from fusion_bench.modelpool import (
    BaseModelPool,
    CausalLMPool,
    ResNetForImageClassificationPool,
)
from helpers import BASE, didi, fine_tuned
from torch import nn

from fusion_bench_didi.errors import ModelPoolError
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.pools.entries import directory_of, load_model, origin_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def models() -> dict[str, nn.Module]:
    base = llama()
    return {BASE: base, "a": fine_tuned(base, 1), "b": fine_tuned(base, 2)}


def saved(place: Path, models: dict[str, nn.Module], inner: str = "", **kw) -> dict:
    for name, model in models.items():
        model.save_pretrained(place / name / inner, **kw)
    return {name: str(place / name) for name in models}


def entries(places: dict[str, str], **settings) -> dict:
    target = "transformers.AutoModelForCausalLM.from_pretrained"
    return {
        name: {"_target_": target, "pretrained_model_name_or_path": where, **settings}
        for name, where in places.items()
    }


def assert_as_loaded(pool: BaseModelPool, tmp_path: Path) -> None:
    """Merged, saved and loaded again: what the pool loads."""
    merged = didi(pool, budget=1e9)
    merged.save_pretrained(tmp_path / "merged")
    again = DiDiModel.from_pretrained(tmp_path / "merged")
    for task in "ab":
        want = pool.load_model(task).state_dict()
        for model in (merged, again):
            found = model.materialize(task).state_dict()
            for name, value in want.items():
                assert found[name].dtype == value.dtype
                torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-2)


def test_arguments_of_the_pool_come_before_those_of_an_entry(models, tmp_path):
    others = {n: fine_tuned(m, 7) if n != BASE else m for n, m in models.items()}
    places = saved(tmp_path, models, variant="one")
    saved(tmp_path, others, variant="other")
    pool = CausalLMPool(
        entries(places, variant="one"),
        tokenizer=None,
        model_kwargs={"variant": "other"},
    )
    assert_as_loaded(pool, tmp_path)


def test_a_subfolder_that_the_pool_asks_for(models, tmp_path):
    places = saved(tmp_path, models, inner="inner")
    saved(tmp_path, {name: fine_tuned(m, 9) for name, m in models.items()})
    pool = CausalLMPool(places, tokenizer=None, model_kwargs={"subfolder": "inner"})
    assert_as_loaded(pool, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_loaded_in_a_smaller_type_than_their_files(models, tmp_path, dtype):
    """Rounding of the base model is no change of a task."""
    with torch.no_grad():
        for task in "ab":
            for name, value in models[task].named_parameters():
                if "q_proj" not in name:
                    value.copy_(models[BASE].get_parameter(name))
    places = saved(tmp_path, models)
    pool = CausalLMPool(places, tokenizer=None, model_kwargs={"torch_dtype": dtype})
    merged = didi(pool, budget=1e9)
    assert all("q_proj" in name for name in merged.touched)
    numel = sum(models[BASE].get_parameter(n).numel() for n in merged.touched)
    assert merged.unit_bits == 16 * numel
    assert_as_loaded(pool, tmp_path)


def test_live_models_of_a_finer_type_than_the_base(models):
    models[BASE].bfloat16()
    merged = didi(models, budget=1e9)
    for task in "ab":
        for name, value in models[task].state_dict().items():
            found = merged.materialize(task).state_dict()[name]
            torch.testing.assert_close(found, value.bfloat16(), atol=1e-3, rtol=1e-2)


def test_types_that_differ_between_tasks_lose_nothing(models, tmp_path):
    models["a"].half()
    pool = BaseModelPool(entries(saved(tmp_path, models)))
    found = didi(pool, budget=1e9).materialize("b").state_dict()
    for name, value in models["b"].state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-7, rtol=1e-6)


def test_a_lazy_pool_whose_entries_name_classes(models, tmp_path):
    made = entries(saved(tmp_path, models))
    for entry in made.values():
        entry["_target_"] = entry["_target_"].removesuffix(".from_pretrained")
    pool = CausalLMPool(made, tokenizer=None, enable_lazy_loading=True)
    merged = didi(pool, budget=1e9)
    merged.save_pretrained(tmp_path / "merged")
    again = DiDiModel.from_pretrained(tmp_path / "merged")
    for name, value in models["a"].state_dict().items():
        found = again.materialize("a").state_dict()[name]
        torch.testing.assert_close(found, value, atol=1e-5, rtol=0)


def test_modules_in_a_pool_of_paths(models):
    merged = didi(CausalLMPool(dict(models), tokenizer=None), budget=1e9)
    found = merged.materialize("b").state_dict()
    for name, value in models["b"].state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


def test_a_file_that_the_configuration_names(models, tmp_path):
    places = saved(tmp_path, models)
    home, other = Path(places["a"]), fine_tuned(models["a"], 5)
    other.save_pretrained(tmp_path / "other")
    named = home / "named.safetensors"
    shutil.copy(tmp_path / "other" / "model.safetensors", named)
    config = json.loads((home / "config.json").read_text())
    config["transformers_weights"] = named.name
    (home / "config.json").write_text(json.dumps(config))
    assert_as_loaded(BaseModelPool(entries(places)), tmp_path)


def _gone(home: Path) -> None:
    shutil.rmtree(home)


def _empty(home: Path) -> None:
    (home / "model.safetensors").unlink()


def _dangling(home: Path) -> None:
    (home / "model.safetensors").unlink()
    (home / "model.safetensors").symlink_to("nowhere")


@pytest.mark.parametrize("damage", [_gone, _empty, _dangling])
@pytest.mark.parametrize("name", ["a", BASE])
@pytest.mark.parametrize("dry_run", [True, False])
def test_entries_that_cannot_be_loaded_are_named(
    models, tmp_path, damage, name, dry_run
):
    places = saved(tmp_path, models)
    damage(Path(places[name]))
    with pytest.raises(ModelPoolError, match=places[name]):
        didi(BaseModelPool(entries(places)), dry_run=dry_run)


@pytest.mark.parametrize("beside", [False, True])
def test_names_of_torchvision_lie_nowhere(models, beside, tmp_path, monkeypatch):
    """Not on the hub, nor in a directory of that name beside the command."""
    monkeypatch.chdir(tmp_path)
    if beside:
        models[BASE].save_pretrained(tmp_path / "resnet18")
    entries = dict.fromkeys((BASE, "a", "b"), "resnet18")
    pool = ResNetForImageClassificationPool(type="torchvision", models=entries)
    assert directory_of(pool, "a") is None and origin_of(pool, "a") is None
    assert type(load_model(pool, "a")).__name__ == "ResNet"
