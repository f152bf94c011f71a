"""Batches of several tasks have no gradients, and say so where one is asked for."""

import copy

import pytest
import torch
from helpers import didi, family
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_bench_didi.errors import DiDiError

IDS = torch.arange(20).view(4, 5)
TASKS = ["mnist", "svhn", "svhn", "mnist"]
WEIGHTS = torch.full((4, 2), 0.5)


@pytest.fixture(scope="module")
def made():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
        return didi(family(LlamaForCausalLM(LlamaConfig(**sizes, **heads))), budget=2.0)


@pytest.fixture
def model(made):
    return copy.deepcopy(made)


def prompt(model) -> torch.Tensor:
    """What a prompt that is trained gives the model."""
    return model.get_input_embeddings()(IDS).detach().requires_grad_()


def nested(model):
    mask = torch.zeros(4, 1, 5, 5, requires_grad=True)
    return model(input_ids=IDS, attention_mask={"full": mask}, task_ids=TASKS)


def weights(model):
    return model(input_ids=IDS, task_weights=WEIGHTS.clone().requires_grad_())


def routed(model):
    model.attach_router("subspace")
    return model(inputs_embeds=prompt(model))


def unfrozen(model):
    model.backbone.requires_grad_(True)
    return model(input_ids=IDS, task_ids=TASKS)


ASKING = {
    "prompt": lambda model: model(inputs_embeds=prompt(model), task_ids=TASKS),
    "of one task": lambda model: model(
        inputs_embeds=prompt(model), task_ids=["svhn"] * 4
    ),
    "nested": nested,
    "task weights": weights,
    "routed": routed,
    "backbone": unfrozen,
}


@pytest.mark.parametrize("asking", ASKING)
def test_gradients_of_several_tasks_are_refused(model, asking):
    # what is trained in a backbone is lost at the next switch
    way_out = "materialize" if asking == "backbone" else "set_task"
    with pytest.raises(DiDiError, match=f"Gradients are asked of .*{way_out}\\("):
        ASKING[asking](model)


def test_prompts_are_trained_through_a_task_that_is_set(model):
    model.set_task("svhn")
    given = prompt(model)
    model(inputs_embeds=given).logits.sum().backward()
    assert given.grad.any()


@pytest.mark.parametrize("asking", sorted(set(ASKING) - {"nested"}))
def test_nothing_is_refused_where_none_are_kept(model, asking):
    with torch.no_grad():
        ASKING[asking](model)


def test_tokens_are_generated_without_gradients_as_of_any_model(model):
    options = {"task_ids": TASKS, "max_new_tokens": 2, "do_sample": False}
    given = prompt(model)
    found = model.generate(inputs_embeds=given, **options)
    assert found.equal(model.generate(inputs_embeds=given.detach(), **options))


def test_what_stands_behind_a_mixed_batch_is_trained(model):
    head = nn.Linear(64, 3)
    head(model(input_ids=IDS, task_ids=TASKS).logits).sum().backward()
    assert head.weight.grad.any()
