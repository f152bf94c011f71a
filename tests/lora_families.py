"""Small language models and CLIP towers with adapters as PEFT writes them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool, CausalLMPool, CLIPVisionModelPool
from helpers import BASE, OpenClipLike, floats
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fusion_bench_didi.models.dynamic import DiDiModel

TASKS = ("mnist", "svhn", "eurosat")


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape))


def clip() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    images = {"image_size": 32, "patch_size": 8, "projection_dim": 32}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, **images, num_attention_heads=4))


ATTENTION = ["q_proj", "v_proj"]


def write_adapter(base: nn.Module, place: Path, seed: int, **config: Any) -> nn.Module:
    """Train an adapter (draw it), save it, and give the model with it merged in."""
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for value in trained:
                value += 0.02 * torch.randn(value.shape)
    model.save_pretrained(place)
    return model.merge_and_unload()


def family(directory: Path, make, tasks=TASKS, **config: Any) -> dict[str, nn.Module]:
    """The base model and one adapter per task in a directory; returns the whole models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = make().eval()
    models = {BASE: base}
    for seed, task in enumerate(tasks, 1):
        models[task] = write_adapter(base, directory / task, seed, **config).eval()
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(directory / BASE)
    return models


def pool_of(directory: Path, base: nn.Module, names=TASKS) -> BaseModelPool:
    """A pool of adapters, around a base model from a directory where it can be saved to one."""
    entries = {BASE: base, **{name: str(directory / name) for name in names}}
    if isinstance(base, OpenClipLike):
        return BaseModelPool(entries)
    entries[BASE] = str(directory / BASE)
    if isinstance(base, CLIPVisionModel):
        return CLIPVisionModelPool(entries)
    return CausalLMPool(entries, tokenizer=None)


@pytest.fixture
def llamas(tmp_path):
    """Adapters that a test may damage."""
    models = family(tmp_path, llama, target_modules=ATTENTION)
    return tmp_path, models, pool_of(tmp_path, models[BASE])


def change_tensors(directory: Path, change) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_close(
    model: DiDiModel, other: Any, *, names: list[str] | None = None, atol: float = 1e-6
) -> None:
    """Weights of every task, against another merged model or whole models."""
    for task in model.tasks:
        whole = other[task] if isinstance(other, dict) else other.materialize(task)
        found, expected = floats(model.materialize(task)), floats(whole)
        for name in expected if names is None else names:
            torch.testing.assert_close(
                found[name], expected[name], atol=atol, rtol=1e-5, msg=f"{task} {name}"
            )
