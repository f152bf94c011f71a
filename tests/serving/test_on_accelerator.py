"""A merged model on an accelerator answers as it does on the CPU; skips where there is none."""

import copy

import pytest
import torch
from helpers import didi
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.serving.banks import Serving

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no accelerator"
)

DEVICE = "cuda"
WAYS = {
    "default": Serving(),
    "matrices": Serving(dense_above=0, small=0),
    "made when used": Serving(small=0, memory_limit_gb=0),
}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-3)


@pytest.fixture(params=[0.3, 0.7, 1.4])
def pair(tiny_clip, request) -> tuple[DynamicModel, DynamicModel]:
    """The model on the CPU and on the accelerator."""
    model = didi(tiny_clip.pool_models(), budget=request.param).eval().cpu()
    return model, copy.deepcopy(model).to(DEVICE)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_one_task_at_a_time(pair, pixels):
    here, there = pair
    for task in here.tasks:
        here.set_task(task)
        there.set_task(task)
        close(there(pixels.to(DEVICE)).pooler_output, here(pixels).pooler_output)
        plain = there.materialize(task)
        assert {p.device.type for p in plain.parameters()} == {DEVICE}
        close(plain(pixels.to(DEVICE)).pooler_output, here(pixels).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_batches_of_several_tasks_and_mixtures(pair, pixels, way):
    here, there = pair
    here.serving = there.serving = WAYS[way]
    ids = torch.arange(12) % 3
    for where in (ids, ids.to(DEVICE), ids.tolist()):
        found = there(pixels.to(DEVICE), task_ids=where)
        close(found.pooler_output, here(pixels, task_ids=ids).pooler_output)
    weights = torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
    found = there(pixels.to(DEVICE), task_weights=weights.to(DEVICE))
    close(found.pooler_output, here(pixels, task_weights=weights).pooler_output)


@torch.no_grad()
def test_routed(pair, pixels):
    for model in pair:
        model.attach_router(make_router("projection", model.tasks))
    here, there = pair
    close(there(pixels.to(DEVICE)).pooler_output, here(pixels).pooler_output)


def test_saved_from_there_and_loaded_there(pair, pixels, tmp_path):
    here, there = pair
    here.save_pretrained(tmp_path / "here")
    there.save_pretrained(tmp_path / "there")
    for file in sorted((tmp_path / "here").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()


@torch.no_grad()
def test_generation_of_several_tasks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        base = LlamaForCausalLM(config)
        models = {"_pretrained_": base}
        for task in ("a", "b"):
            tuned = copy.deepcopy(base)
            for value in tuned.parameters():
                value.add_(0.05 * torch.randn(value.shape))
            models[task] = tuned
    here = didi(models, budget=0.7).eval().cpu()
    there = copy.deepcopy(here).to(DEVICE)
    prompt = torch.arange(8).view(2, 4)
    options = {"max_new_tokens": 6, "do_sample": False, "task_ids": ["a", "b"]}
    found = there.generate(prompt.to(DEVICE), **options)
    assert found.tolist() == here.generate(prompt, **options).tolist()
