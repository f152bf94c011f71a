"""Live models whose weights are not in memory, wholly or in part, wherever they stand in a pool."""

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from exact_models import llama, pool_of, seeded
from fusion_bench.modelpool import BaseModelPool, CausalLMPool
from helpers import BASE, didi
from torch import nn
from transformers import LlamaForCausalLM

from fusion_bench_didi import DiDiModel
from fusion_bench_didi.editing import add_task
from fusion_bench_didi.errors import CheckpointMismatchError

PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")  # fmt: skip
ON_DISK = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict:
    place = tmp_path_factory.mktemp("models")
    for name, model in pool_of(llama()).items():
        model.save_pretrained(place / name)
    return {name: place / name for name in (BASE, "a", "b")}


def loaded(directory, **options) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(directory, **options)


def by_device_map(directory, folder) -> nn.Module:
    return loaded(directory, device_map=ON_DISK, offload_folder=folder)


def to_disk(directory, folder) -> nn.Module:
    return disk_offload(loaded(directory), folder)


def to_cpu(directory, folder) -> nn.Module:
    return cpu_offload(loaded(directory), torch.device("cpu"))


def never_loaded(directory, folder) -> nn.Module:
    return loaded(directory).to("meta")


def one_vector(directory, folder) -> nn.Module:
    model = loaded(directory)
    model.model.norm.to("meta")
    return model


KINDS = {
    by_device_map: r"9 of 21 .*layers\.1",
    to_disk: "21 of 21",
    to_cpu: "21 of 21",
    never_loaded: "21 of 21",
    one_vector: r"1 of 21 weights not in memory: model\.norm\.weight are",
}


@pytest.mark.parametrize("name", [BASE, "b"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_in_memory(directories, kind, name, tmp_path):
    models = {name: loaded(place) for name, place in directories.items()}
    models[name] = kind(directories[name], tmp_path)
    message = f"'{name}' .LlamaForCausalLM. has {KINDS[kind]}.*meta device.*directory"
    with pytest.raises(CheckpointMismatchError, match=message):
        didi(models)
    models[name] = str(directories[name])
    assert didi(CausalLMPool(models, tokenizer=None)).tasks == ["a", "b"]


def test_what_a_pool_loads_so(directories, tmp_path):
    """Experts are read from their files all the same; the base model is to be in memory."""
    offloaded = {"device_map": ON_DISK, "offload_folder": str(tmp_path / "offloaded")}
    target = "transformers.LlamaForCausalLM.from_pretrained"

    def pool(which: str) -> BaseModelPool:
        return BaseModelPool(
            {
                name: {
                    "_target_": target,
                    "pretrained_model_name_or_path": str(place),
                    **(offloaded if name == which else {}),
                }
                for name, place in directories.items()
            }
        )

    assert didi(pool("a")).tasks == ["a", "b"]
    with pytest.raises(CheckpointMismatchError, match=f"'{BASE}' .*without device_map"):
        didi(pool(BASE))


@pytest.mark.parametrize("place", ["weight", "buffer"])
def test_models_of_no_library(place):
    models = pool_of(seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))
    models["a"][place == "buffer"].to("meta")
    with pytest.raises(CheckpointMismatchError, match="'a' .Sequential. has"):
        didi(models)


def test_a_base_model_that_a_merge_is_loaded_with(directories, tmp_path):
    models = {name: loaded(place) for name, place in directories.items()}
    didi(copy.deepcopy(models)).save_pretrained(tmp_path / "merged")
    for kind in KINDS:
        backbone = kind(directories[BASE], tmp_path / "offloaded")
        with pytest.raises(
            CheckpointMismatchError, match="LlamaForCausalLM. has .*meta device"
        ):
            DiDiModel.from_pretrained(tmp_path / "merged", backbone=backbone)


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj"])


def wrapped(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, lora())


def injected(model: nn.Module) -> nn.Module:
    return peft.inject_adapter_in_model(lora(), model)


def added(model: nn.Module) -> nn.Module:
    try:
        model.add_adapter(lora())
    except ValueError as error:  # transformers 5 on an older PEFT
        pytest.skip(str(error))
    return model


@pytest.mark.parametrize("name", [BASE, "b"])
@pytest.mark.parametrize("kind", [wrapped, injected, added])
def test_layers_of_peft_are_to_be_merged_or_given_by_their_directory(
    directories, kind, name
):
    models = {name: loaded(place) for name, place in directories.items()}
    models[name] = kind(models[name])
    message = f"(?s)Layers of PEFT are in {name}: .*merge_and_unload.*directory"
    with pytest.raises(CheckpointMismatchError, match=message) as caught:
        didi(models)
    assert "exclude" not in str(caught.value)


def test_such_ways_out_are_ways_out(directories, tmp_path):
    models = {name: loaded(place) for name, place in directories.items()}
    merged = didi(models)
    adapted = wrapped(loaded(directories[BASE]))
    nn.init.ones_(adapted.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"))  # fmt: skip
    with pytest.raises(CheckpointMismatchError, match="Layers of PEFT are in c: "):
        add_task(merged, adapted, "c", budget=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    add_task(merged, tmp_path / "adapter", "c", budget=0.5)
    add_task(merged, adapted.merge_and_unload(), "d", budget=0.5)
    assert merged.tasks == ["a", "b", "c", "d"]
