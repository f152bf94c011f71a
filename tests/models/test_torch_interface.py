"""What torch and transformers do with any module does no harm to a merged one: states saved and loaded, functions applied to all
modules, tensors given other shapes."""

import copy

import pytest
import torch
from helpers import didi, family, floats, same_bits
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_bench_didi.errors import DiDiError

IDS = torch.arange(20).view(4, 5)


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


def merged(*, tied: bool = False):
    return didi(family(llama(tied=tied)), budget=1e6).eval()


def logits(model, **tasks) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **tasks).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("there", [None, "mnist", "svhn"])
@pytest.mark.parametrize("here", [None, "mnist"])
def test_a_state_is_of_the_base_whatever_task_is_on(there, here, tied):
    model = merged(tied=tied)
    want = {task: floats(model.materialize(task)) for task in model.tasks}
    other = copy.deepcopy(model)
    if there:
        model.set_task(there)
    if here:
        other.set_task(here)
    before = floats(model.backbone)
    other.load_state_dict(model.state_dict())
    assert other.current_task == here and model.current_task == there
    assert same_bits(before, floats(model.backbone))
    for task in model.tasks:
        other.set_task(task)
        assert same_bits(want[task], floats(other.backbone))
    live = other.state_dict(keep_vars=True)["backbone.lm_head.weight"]
    assert live is other.backbone.lm_head.weight


@pytest.mark.parametrize("inside", [False, True])
def test_a_state_that_is_loaded_is_the_base_of_mixed_batches_too(inside):
    model, tasks = merged(), ["mnist", "svhn", "svhn", "mnist"]
    state = {
        name: 2 * value if name.endswith("lm_head.weight") else value
        for name, value in model.state_dict().items()
    }
    logits(model, task_ids=tasks)
    whole = nn.ModuleDict({"merged": model}) if inside else model
    prefix = "merged." if inside else ""
    whole.load_state_dict({prefix + name: value for name, value in state.items()})
    found = logits(model, task_ids=tasks)
    for row, task in enumerate(tasks):
        model.set_task(task)
        torch.testing.assert_close(found[row], logits(model)[row])


def test_a_function_is_applied_to_every_module():
    model, seen = merged(), []
    model.set_task("mnist")
    before = floats(model)
    assert model.apply(seen.append) is model
    assert set(map(id, seen)) == {id(module) for module in model.modules()}
    assert same_bits(before, floats(model))


@pytest.mark.parametrize("when", ["before", "with a task", "after a mixed batch"])
@pytest.mark.parametrize("through", [True, False])
def test_tensors_of_other_shapes_are_no_tasks(when, through):
    model = merged()
    if when == "with a task":
        model.set_task("mnist")
    elif when == "after a mixed batch":
        logits(model, task_ids=["mnist", "svhn"] * 2)
    message = r"(embed_tokens|lm_head).weight is \(70, 16\) now, and was \(64, 16\)"
    if through:
        with pytest.raises(DiDiError, match=message):
            model.resize_token_embeddings(70, mean_resizing=False)
    else:
        model.backbone.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(DiDiError, match=message):
        model.set_task("svhn")


def test_what_resizes_nothing_does_no_harm():
    model = merged()
    model.set_task("mnist")
    before = logits(model)
    model.resize_token_embeddings(64)
    assert logits(model).equal(before)
    plain = model.materialize("mnist")
    plain.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(plain(IDS).logits[..., :64], before)


def test_mixed_batches_follow_what_is_changed_through_the_model():
    model, tasks = merged(), ["svhn", "mnist", "svhn", "mnist"]
    logits(model, task_ids=tasks)
    model.gradient_checkpointing_enable()
    model.train()
    found = logits(model, task_ids=tasks)
    for row, task in enumerate(tasks):
        model.set_task(task)
        torch.testing.assert_close(found[row], logits(model)[row])
