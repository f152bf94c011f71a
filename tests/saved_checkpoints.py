"""Small models in the directories of ``from_pretrained``, whose files tests change, and pools of them."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from exact_models import seeded
from fusion_bench.modelpool import BaseModelPool
from helpers import didi
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    return seeded(lambda: LlamaForCausalLM(config))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
    return seeded(lambda: GPT2LMHeadModel(config))


@torch.no_grad()
def tuned(model: nn.Module, seed: int, only: str = "") -> nn.Module:
    made, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, value in made.named_parameters():
        if only in name:
            value += 0.05 * torch.randn(value.shape, generator=g)
    return made


def pool_of(place: Path, cls: type, tasks: str = "ab") -> BaseModelPool:
    target = f"transformers.{cls.__name__}.from_pretrained"
    entry = lambda name: {  # noqa: E731
        "_target_": target,
        "pretrained_model_name_or_path": str(place / name),
    }
    names = {"_pretrained_": "base", **{t: t for t in tasks}}
    return BaseModelPool({name: entry(where) for name, where in names.items()})


def saved(place: Path, models: dict[str, nn.Module]) -> None:
    for name, model in models.items():
        model.save_pretrained(place / name)


def as_pickle(place: Path, state: dict) -> None:
    """In place of the safetensors of a saved model."""
    (place / "model.safetensors").unlink()
    torch.save(state, place / "pytorch_model.bin")


def change_file(place: Path, change: Callable[[dict], dict]) -> None:
    file = place / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def assert_exact(pool: BaseModelPool, tasks: str = "ab") -> None:
    """What is merged without a limit are the models that the host loads."""
    merged = didi(pool, budget=1e9)
    for task in tasks:
        found, want = merged.materialize(task).state_dict(), pool.load_model(task)
        for name, value in want.state_dict().items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)
