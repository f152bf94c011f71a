"""Batches of several tasks: what is taken for a task, and for a sample."""

import numpy as np
import pytest
import torch
from exact_models import exact_model, llama, pool_of, seeded, tokens
from helpers import BASE, TRANSFORMERS
from mixed_net import IDS, NAMES, close, net
from torch import nn
from transformers import (
    BatchEncoding,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from fusion_bench_didi.errors import DiDiError, UnknownTaskError

# --- tasks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        torch.tensor(IDS, dtype=torch.uint8),
        np.array(IDS),
        IDS,
        tuple(IDS),
        NAMES,
        tuple(NAMES),
        np.array(NAMES, dtype=object),
        ["b", 0, torch.tensor(1), np.int64(0), None],
        [1, 0, "b", "a", 2],
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_tasks_may_be_given_by_position_or_name_in_any_sequence(net, ids):
    close(net.model(net.x, task_ids=ids), net.expected)


def test_an_array_of_names_is_a_list_of_names(net):
    found = net.model(net.x, task_ids=np.array(["b", "a", "b", "a", "a"]))
    close(found[:4], net.expected[:4])


@pytest.mark.parametrize("weights", [torch.eye(2)[[1, 0, 1, 0]], [[0, 1], [1, 0]] * 2])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, lambda rows: rows])
def test_weights_may_be_a_tensor_an_array_or_rows(net, weights, kind):
    found = net.model(net.x[:4], task_weights=kind(weights))
    close(found, net.expected[:4])


@pytest.mark.parametrize("size", [1, 2, 4, 6, 8, 10])
def test_another_number_of_tasks_is_refused_with_both_numbers(net, size):
    ids = torch.arange(size) % 2
    with pytest.raises(DiDiError, match=rf"{size} task_ids for a batch of 5 samples"):
        net.model(net.x, task_ids=ids)
    with pytest.raises(DiDiError, match=rf"{size} task_ids for a batch of 5 samples"):
        net.model(net.x, task_ids=["a"] * size)
    with pytest.raises(DiDiError, match=rf"{size} rows of task_weights .* 5 samples"):
        net.model(net.x, task_weights=torch.eye(2)[ids])
    with pytest.raises(DiDiError, match=rf"{size} rows of task_weights .* 5 samples"):
        net.model(net.x, task_weights=torch.full((size, 2), 0.5))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([True, False, True, False, False]),
        [True, False, True, False, False],
        torch.tensor(IDS, dtype=torch.float32),
        [1.0, 0.0, 1.0, 0.0, 2.0],
        np.array(IDS, dtype=np.float64),
        torch.tensor([IDS]),
        torch.tensor([IDS]).T,
        torch.tensor(1),
        1,
        "b",
        b"babab",
    ],
)
def test_what_is_no_position_and_no_name_is_refused(net, ids):
    with pytest.raises(DiDiError, match="task_ids"):
        net.model(net.x, task_ids=ids)


@pytest.mark.parametrize("wrong", [-1, 3, 99, "c", "A", ""])
def test_tasks_that_are_not_there_are_named(net, wrong):
    for ids in ([0, 1, 0, 1, wrong], np.array([0, 1, 0, 1, wrong], dtype=object)):
        with pytest.raises(UnknownTaskError, match=r"\['a', 'b'\]"):
            net.model(net.x, task_ids=ids)


@pytest.mark.parametrize(
    "weights, what",
    [
        (torch.eye(3)[[0, 1, 2, 0, 1]], "3"),
        (torch.ones(5, 1), "1"),
        (torch.ones(5), "expected one row per sample"),
        (torch.ones(5, 2, 1), "expected one row per sample"),
        (torch.tensor([[1.0, float("nan")]] * 5), "NaN"),
        (torch.tensor([[1.0, float("inf")]] * 5), "infinity"),
        ([["a", "b"]] * 5, "no matrix of numbers"),
        ([[1, 2], [3]], "no matrix of numbers"),
    ],
)
def test_weights_that_are_none_are_refused(net, weights, what):
    with pytest.raises(DiDiError, match=what):
        net.model(net.x, task_weights=weights)


def test_tasks_and_weights_at_once_are_refused(net):
    with pytest.raises(DiDiError, match="not both"):
        net.model(net.x, task_ids=IDS, task_weights=torch.ones(5, 2))


# --- samples ------------------------------------------------------------------------


class Takes(nn.Module):
    """Adds up rows of whatever it is given, where only ``x`` is sure to hold one per sample."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x, scale=None, table=None, *, more=None, cache_position=None):
        if isinstance(x, (dict, BatchEncoding)):
            x = x["x"]
        if isinstance(x, (tuple, list)):
            x = sum(x)
        y = self.last(x)
        for other in (scale, *(more or {}).values()):
            y = y if other is None else y * other.view(-1, 1)
        if table is not None:
            y = y @ table
        return y if cache_position is None else y + cache_position.sum()


def _given(size: int) -> dict:
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(1.0, size + 1)
    return {
        "positional": ((x,), {}),
        "by name": ((), {"x": x}),
        "rows after it": ((x, rows), {}),
        "named the other way round": ((), {"scale": rows, "x": x}),
        "a mapping": (({"x": x},), {}),
        "transformers' mapping": ((BatchEncoding({"x": x}),), {}),
        "a tuple": (((x, x),), {}),
        "a list": (([x, 2 * x],), {}),
        "a table for all": ((x,), {"table": torch.eye(3)[:, :2] + 1}),
        "rows inside": ((x,), {"more": {"one": rows, "other": rows.flip(0)}}),
        "rows as an array": ((x,), {"more": {"one": rows}}),
        "positions for all": ((x,), {"cache_position": torch.arange(size)}),
    }


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("what", _given(1))
@pytest.mark.parametrize("how", ["layered", "grouped"])
def test_samples_are_found_in_what_is_given(what, size, how):
    models = pool_of(seeded(Takes))
    model = exact_model(models, how)
    args, kwargs = _given(size)[what]
    ids = [i % 2 for i in range(size)]
    found = model(*args, **kwargs, task_ids=ids)
    for i, task in enumerate(ids):
        close(found[i], models["ab"[task]](*args, **kwargs)[i])
    with pytest.raises(DiDiError, match=rf"{size + 1} task_ids .* {size} samples"):
        model(*args, **kwargs, task_ids=[0] * (size + 1))


def test_a_call_that_tells_no_samples_is_refused(net):
    with pytest.raises(DiDiError, match="no sample"):
        net.model(net.x[:0], task_ids=[])
    with pytest.raises(DiDiError, match="tells how many samples"):
        net.model(task_ids=[0, 1])


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize("length", [2, 3, 5])
@torch.no_grad()
def test_masks_positions_and_numbers_of_logits_of_language_models(how, length):
    """Also where a batch is as long as its texts."""
    models = pool_of(llama())
    model = exact_model(models, how)
    ids, tasks = tokens(3, length), ["b", "a", "b"]
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    options = {
        "attention_mask": mask,
        "position_ids": torch.arange(length)[None] + 1,
        "cache_position": torch.arange(length),
        "logits_to_keep": 2,
    }
    for key in ("input_ids", "inputs_embeds"):
        given = ids if key == "input_ids" else models[BASE].get_input_embeddings()(ids)
        found = model(**{**options, key: given}, task_ids=tasks).logits
        for i, task in enumerate(tasks):
            own = {**options, key: given[i : i + 1], "attention_mask": mask[i : i + 1]}
            close(found[i : i + 1], models[task](**own).logits)


def qwen_vl() -> Qwen2VLForConditionalGeneration:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=60,
        vision_start_token_id=61,
    )
    return seeded(lambda: Qwen2VLForConditionalGeneration(config))


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize("size", [2, 3])
def test_positions_of_three_kinds_are_not_taken_for_samples(how, size):
    models = pool_of(qwen_vl())
    model = exact_model(models, how)
    ids, tasks = tokens(size, 4) % 50 + 3, ["b", "a", "b"][:size]
    positions = torch.arange(3 * size * 4).view(3, size, 4) % 7
    found = model(input_ids=ids, position_ids=positions, task_ids=tasks).logits
    for i, task in enumerate(tasks):
        own = models[task](
            input_ids=ids[i : i + 1], position_ids=positions[:, i : i + 1]
        )
        close(found[i : i + 1], own.logits)


def test_images_whose_patches_lie_in_one_row_are_refused():
    model = exact_model(pool_of(qwen_vl()))
    ids = tokens(2, 4) % 50
    ids[:, 1] = 60
    images = {
        "pixel_values": torch.randn(8, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
    }
    if TRANSFORMERS >= 5:
        images["mm_token_type_ids"] = (ids == 60).long()
    assert len(model(input_ids=ids, **images, task_ids=["b", "b"]).logits) == 2
    with pytest.raises(DiDiError, match="image_grid_thw .* one row for each of the 2"):
        model(input_ids=ids, **images, task_ids=["b", "a"])


def llava() -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=8),
        text_config=LlamaConfig(**sizes, vocab_size=64),
        image_token_index=60,
        vision_feature_layer=-1,
    )
    return seeded(lambda: LlavaForConditionalGeneration(config))


@pytest.mark.parametrize("how", ["layered", "grouped"])
@torch.no_grad()
def test_as_many_images_as_samples_are_refused_where_they_are_not_one_each(how):
    """Also after batches of one each, and where every task has as many images as samples."""
    models = pool_of(llava())
    model, tasks = exact_model(models, how), ["b", "a", "a", "b"]
    pixels, texts = torch.randn(4, 3, 8, 8), tokens(4, 4) % 50 + 3
    one = texts.clone()
    one[:, 1] = 60
    found = model(input_ids=one, pixel_values=pixels, task_ids=tasks)
    for i, task in enumerate(tasks):
        own = models[task](input_ids=one[i : i + 1], pixel_values=pixels[i : i + 1])
        close(found.logits[i : i + 1], own.logits)
        if TRANSFORMERS >= 5:  # a list of one for each image
            close(found.image_outputs.pooler_output[i], own.image_outputs.pooler_output[0])  # fmt: skip
    for counts in ((2, 0, 2, 0), (1, 1, 2, 0), (0, 0, 2, 2), (0, 2, 0, 2)):
        uneven = texts.clone()
        for row, count in zip(uneven, counts):
            row[:count] = 60
        for args in ((uneven, pixels), ()):
            given = {} if args else {"input_ids": uneven, "pixel_values": pixels}
            for ids in (tasks, sorted(tasks)):
                with pytest.raises(DiDiError, match=r"pixel_values \(4, 3, 8, 8\) .* each of the 4 samples.*no place for one"):  # fmt: skip
                    model(*args, **given, task_ids=ids)
            whole = model(*args, **given, task_ids=["a"] * 4).logits
            close(whole, models["a"](uneven, pixels).logits)


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize("length", [2, 3, 4])
@torch.no_grad()
def test_memories_whose_samples_lie_second_are_those_of_the_samples(how, length):
    config = XLNetConfig(
        d_model=16, n_layer=2, n_head=2, d_inner=16, vocab_size=64, mem_len=4
    )
    models = pool_of(seeded(lambda: XLNetLMHeadModel(config)))
    model, tasks = exact_model(models, how), ["b", "a", "b"]
    ids, mems = tokens(3, 4), [torch.randn(length, 3, 16) for _ in range(2)]
    found = model(input_ids=ids, mems=mems, use_mems=True, task_ids=tasks)
    for i, task in enumerate(tasks):
        part = [mem[:, i : i + 1] for mem in mems]
        own = models[task](input_ids=ids[i : i + 1], mems=part, use_mems=True)
        close(found.logits[i : i + 1], own.logits)
        for left, right in zip(found.mems, own.mems, strict=True):
            close(left[:, i : i + 1], right)


class Tasked(nn.Module):
    """Takes arguments that are called as those of tasks."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x, task_ids=None, *, task_weights=None):
        y = self.last(x)
        y = y if task_ids is None else y + task_ids[:, None]
        return y if task_weights is None else y * task_weights

    def scaled(self, x, task_weights=None):
        return self.last(x) if task_weights is None else self.last(x) * task_weights


@pytest.mark.parametrize("task", [None, "a"])
def test_what_may_be_meant_for_the_base_model_or_for_the_tasks_is_refused(task):
    models, tasks = pool_of(seeded(Tasked)), ["b", "a", "b"]
    model, x, own = exact_model(models), torch.randn(3, 6), torch.tensor([0, 1, 1])
    if task is not None:
        model.set_task(task)
    with pytest.raises(DiDiError, match="^forward .* takes task_ids itself"):
        model(x, task_ids=own)
    with pytest.raises(DiDiError, match="^forward .* takes task_weights itself"):
        model(x, task_weights=torch.ones(3, 2))
    with pytest.raises(DiDiError, match="^scaled .* takes task_weights itself"):
        model.scaled(x, task_weights=torch.ones(3, 2))
    # by position it is the base model's, by name the tasks'
    for given in (own, None):
        found = model(x, given, task_ids=tasks)
        for i, name in enumerate(tasks):
            each = None if given is None else given[i : i + 1]
            close(found[i : i + 1], models[name](x[i : i + 1], each))
    assert model.scaled(x, task_ids=tasks).shape == (3, 3)
    if task is not None:
        close(model(x, own), models[task](x, own))
        close(model.backbone(x, task_ids=own), models[task](x, own))
