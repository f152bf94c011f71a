"""Tasks' weights after a merge against their fine-tuned models."""

import pytest
import torch
from helpers import BASE, floats
from torch import nn
from transformers import GPT2Config, GPT2Model


def gpt2() -> GPT2Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2Model(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
        )


def assert_task_weights(model, tuned: dict[str, nn.Module], atol: float) -> None:
    for task, expected in tuned.items():
        found = floats(model.materialize(task))
        for name, value in floats(expected).items():
            torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=name)


@pytest.fixture
def pool(tiny_clip_dir):
    return clip_pool(tiny_clip_dir)


def clip_pool(directory):
    from fusion_bench.modelpool import CLIPVisionModelPool

    tasks = sorted(p.name for p in directory.iterdir() if p.name != BASE)
    return CLIPVisionModelPool({n: str(directory / n) for n in (BASE, *tasks)})
