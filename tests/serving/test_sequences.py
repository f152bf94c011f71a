"""Layers that run along the first dimension, in batches of several tasks."""

import pytest
import torch
from exact_models import exact_model, pool_of, seeded
from helpers import BASE
from mixed_net import close
from torch import nn

from fusion_bench_didi.errors import DiDiError


def _layer(kind: str, first: bool) -> nn.Module:
    if kind in ("RNN", "LSTM", "GRU"):
        return getattr(nn, kind)(8, 8, batch_first=first)
    if kind == "attention":
        return nn.MultiheadAttention(8, 2, batch_first=first)
    if kind == "transformer":
        return nn.Transformer(8, 2, 1, 1, 8, dropout=0.0, batch_first=first)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=first)
    return (
        layer
        if kind == "layer"
        else nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    )


class Along(nn.Module):
    """One layer that runs along one side of its input, between two that do not.

    Args:
        kind: of the layer.
        first: whether it is made for samples in front.
        turned: whether its inputs are turned for it, and its outputs back.
    """

    def __init__(self, kind: str, *, first: bool, turned: bool = False):
        super().__init__()
        self.inner, self.turned = _layer(kind, first), turned
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        x = x.transpose(0, 1) if self.turned else x
        if isinstance(self.inner, nn.MultiheadAttention):
            x, _ = self.inner(value=x, query=x, key=x)
        elif isinstance(self.inner, nn.Transformer):
            x = self.inner(x, x)
        else:
            x = self.inner(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.after(x.transpose(0, 1) if self.turned else x)


KINDS = ("RNN", "LSTM", "GRU", "attention", "layer", "encoder", "transformer")


@pytest.mark.parametrize("length", [2, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_samples_that_a_layer_would_run_along_are_refused(kind, length):
    """Whether or not a batch is as long as it is large; of one task it is what that task's model makes of it."""
    models = pool_of(seeded(lambda: Along(kind, first=False)))
    model, x = exact_model(models), torch.randn(4, length, 8)
    for how in ({"task_ids": ["a", "b", "b", "a"]}, {"task_weights": torch.eye(4)[:, :2]}):  # fmt: skip
        with pytest.raises(DiDiError, match=r"inner.* \(\w+, batch_first=False\) runs along .*batch_first=True.*set_task"):  # fmt: skip
            model(x, **how)
    close(model(x, task_ids=["b"] * 4), models["b"](x))
    model.set_task("a")
    close(model(x), models["a"](x))


@pytest.mark.parametrize("way", ["samples in front", "turned for it"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layers_that_are_given_samples_where_they_want_them_are_right(kind, way):
    turned = way == "turned for it"
    models = pool_of(seeded(lambda: Along(kind, first=not turned, turned=turned)))
    model, x = exact_model(models), torch.randn(3, 3, 8)
    tasks = ["a", "b", None]
    found = model(x, task_ids=tasks)
    for i, task in enumerate(tasks):
        close(found[i : i + 1], models[task or BASE](x[i : i + 1]))


@torch.no_grad()
def test_rows_that_a_layer_takes_for_one_sequence_are_refused():
    """torch takes a matrix for a sequence without samples."""
    model = exact_model(pool_of(seeded(lambda: Along("GRU", first=True))))
    with pytest.raises(DiDiError, match="inner .* runs along the first dimension"):
        model(torch.randn(4, 8), task_ids=["a", "b", "b", "a"])


class Remembers(nn.Module):
    """What came before is given with the samples in the second dimension."""

    def __init__(self):
        super().__init__()
        self.inner = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.inner(x, before)[0]


@pytest.mark.parametrize("size", [2, 4])
@torch.no_grad()
def test_what_is_no_row_of_a_sample_is_named_where_the_model_takes_it_whole(size):
    model = exact_model(pool_of(seeded(Remembers)))
    x, before = torch.randn(size, 3, 8), torch.randn(1, size, 8)
    with pytest.raises(DiDiError, match=rf"on all {size} samples and not .*before \(1, {size}, 8\)"):  # fmt: skip
        model(x, before, task_ids=[0, 1, 0, 1][:size])
    with pytest.raises(RuntimeError, match="hidden size") as error:
        model(x, before[:, :0], task_ids=[0, 1, 0, 1][:size])
    assert not isinstance(error.value, DiDiError)
