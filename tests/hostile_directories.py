"""Saved models that were changed by someone who means harm, and language models in their directories."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import didi, family
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fusion_bench_didi.checkpoint.fields import CHECKSUM, sealed

#: A file that code makes where it runs.
MARK = "ran"


def rewrite(directory: Path, change: Callable[[dict], object]) -> None:
    """As someone would who means harm, and knows how a manifest is sealed."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config.pop(CHECKSUM, None)
    change(config)
    file.write_text(json.dumps(sealed(config)))


def with_backbone(directory: Path, **changes: object) -> None:
    rewrite(directory, lambda config: config["backbone"].update(changes))


class Bomb:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def write_language_model(directory: Path, kind: str = "gpt2") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": 30, "num_hidden_layers": 1, "num_attention_heads": 2}
        if kind == "gpt2":
            sizes = {"vocab_size": 30, "n_layer": 1, "n_head": 2}
            model = GPT2LMHeadModel(GPT2Config(n_embd=16, **sizes))
        else:
            config = LlamaConfig(hidden_size=16, intermediate_size=24, **sizes)
            model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return model.eval()


def merged_language_model(directory: Path, place: str, **known: object) -> nn.Module:
    """A merge in ``directory`` whose base model lies in ``place`` in it; returns the base model."""
    base = write_language_model(directory.parent / "base")
    didi(family(copy.deepcopy(base)), budget=0.9).save_pretrained(directory)
    os.rename(directory.parent / "base", directory / place)
    with_backbone(
        directory,
        source=place,
        **{"class": "transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel", **known},
    )
    return base
