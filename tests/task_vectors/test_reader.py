"""What becomes of every tensor that fine-tuned models hold: merged, a task's own, left out as asked, or refused; never lost."""

import pytest
import torch
from helpers import BASE, task_vectors
from torch import nn

from fusion_bench_didi.errors import CheckpointMismatchError, SettingsError
from fusion_bench_didi.task_vectors.sources import TensorInfo


class Held(nn.Module):
    """A matrix to merge, and a tensor of some type."""

    def __init__(self, dtype: torch.dtype, buffer: bool = False):
        super().__init__()
        self.body = nn.Parameter(torch.ones(3, 3))
        value = torch.ones(2, 2).to(dtype)
        if buffer:
            self.register_buffer("odd", value)
        else:
            self.odd = nn.Parameter(value, requires_grad=False)


PAIRS = [
    (torch.int8, torch.float16),
    (torch.uint8, torch.bfloat16),
    (torch.bool, torch.float32),
    (torch.complex64, torch.float32),
    (torch.float32, torch.int8),
]
ORDERS = [("same", "other"), ("other", "same")]


def models(base: torch.dtype, other: torch.dtype, order: tuple, buffer: bool = False):
    made = {"same": Held(base, buffer), "other": Held(other, buffer)}
    return {BASE: Held(base, buffer), **{task: made[task] for task in order}}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_tensor_of_another_kind_than_the_base_models_is_refused(pair, order):
    base, other = pair
    with pytest.raises(
        CheckpointMismatchError, match=f"other: odd is of {other}, the .* has {base}"
    ):
        task_vectors(models(*pair, order))
    left = task_vectors(models(*pair, order), exclude=["odd"])
    assert [*left.infos, *left.own_infos] == ["body"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pair", PAIRS[:-1], ids=str)
@pytest.mark.parametrize("how", ["own", "buffer", "the same"])
def test_what_is_not_merged_is_each_tasks_own(pair, order, how):
    if how == "own":
        found = task_vectors(models(*pair, order), own=["odd"])
    elif how == "buffer":
        given = models(*pair, order, buffer=True)
        found = task_vectors(given, buffers=frozenset({"odd"}))
    else:
        found = task_vectors(models(pair[0], pair[0], order))
    assert ([*found.infos], [*found.own_infos]) == (["body"], ["odd"])


@pytest.mark.parametrize("key", ["own", "as_vectors"])
def test_patterns_of_tensors_that_the_base_model_does_not_load_are_refused(key):
    """Of the text tower of a whole CLIPModel, say."""
    given = models(torch.float32, torch.float32, ORDERS[0])
    base = given.pop(BASE)
    del base.odd
    ignored = {"odd": TensorInfo((2,), torch.float32)}
    for choice in (["odd"], ["odd*"]):
        with pytest.raises(
            SettingsError, match=f"{key}: .*odd, which the base model does not load"
        ):
            task_vectors({BASE: base, **given}, ignored=ignored, **{key: choice})
    all_of_them = {key: ["*"], "ignored": ignored}
    found = task_vectors({BASE: base, **given}, **all_of_them)
    assert [*found.infos, *found.own_infos] == ["body"]


def test_a_task_may_be_called_the_base_model():
    given = models(torch.int8, torch.int8, ORDERS[0])
    given["the base model"] = given.pop("other")
    with torch.no_grad():
        given["the base model"].body += 1
    found = task_vectors(given).identity
    assert len(found) == len(given) and f"{BASE}, in memory" in found


def test_headers_do_not_tell_buffers_from_parameters():
    """In a dry run, a counter that someone has cast with all the rest is no fault yet."""
    found = task_vectors(
        models(torch.int64, torch.float16, ORDERS[0], buffer=True), loaded=False
    )
    assert ([*found.infos], [*found.own_infos]) == (["body"], ["odd"])
