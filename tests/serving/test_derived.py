"""Modules that keep for evaluation what they work out of their weights: never that of another task."""

import copy

import pytest
import torch
from exact_models import exact_model, pool_of, seeded, state_of, unchanged
from helpers import BASE
from torch import Tensor, nn
from transformers import LevitConfig, LevitForImageClassification
from transformers.models.omdet_turbo.modeling_omdet_turbo import OmDetTurboLRUCache


class Lazily(nn.Module):
    """Worked out at the first forward."""

    def __init__(self):
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.randn(3, 4)), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = self.weight.exp()
        return x @ self.table.mT


class ByDevice(nn.Module):
    """Worked out at the first forward of a device, dropped on the way to training, as LeViT's attention biases are."""

    def __init__(self):
        super().__init__()
        self.weight, self.tables = nn.Parameter(torch.randn(3, 4)), {}

    def train(self, mode: bool = True) -> "ByDevice":
        if mode and self.tables:
            self.tables = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if x.device not in self.tables:
            self.tables[x.device] = self.weight.exp()
        return x @ self.tables[x.device].mT


class AtEvaluation(nn.Module):
    """Worked out on the way to evaluation."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    @torch.no_grad()
    def train(self, mode: bool = True) -> "AtEvaluation":
        self.table = None if mode else self.weight.exp()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.exp() if self.training else self.table).mT


class ByPrompt(nn.Module):
    """Keeps results in a cache of an architecture's own, as OmDet-Turbo those of its texts, of what layers inside gave."""

    def __init__(self):
        super().__init__()
        self.layer, self.results = nn.Linear(4, 3), OmDetTurboLRUCache(8)

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.tolist())
        if not self.results.has(key):
            self.results.put(key, self.layer(x))
        return self.results.get(key)


class OfAChild(nn.Module):
    """Worked out of the tensors of a module inside, at the first forward."""

    def __init__(self):
        super().__init__()
        self.inner, self.table = nn.Sequential(nn.Linear(4, 3)), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = self.inner[0].weight.exp()
        return x @ self.table.mT + self.inner[0].bias


class OfAChildByDevice(OfAChild):
    """Kept by device, as pairs."""

    def __init__(self):
        super().__init__()
        self.table = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.device not in self.table:
            layer = self.inner[0]
            self.table[x.device] = (layer.weight.exp(), layer.bias.exp())
        weight, bias = self.table[x.device]
        return x @ weight.mT + bias


class OfAChildAtEvaluation(OfAChild):
    """Worked out on the way to evaluation."""

    @torch.no_grad()
    def train(self, mode: bool = True) -> "OfAChildAtEvaluation":
        self.table = None if mode else self.inner[0].weight.exp()
        return super().train(mode)


class Reader(nn.Module):
    """Worked out of a module's tensors that it refers to, and does not hold itself."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.others, self.table = [other], None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = self.others[0].weight.exp()
        return x @ self.table.mT


class OfAnother(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.reader = Reader(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.first(x))


class Net(nn.Module):
    def __init__(self, kind: type):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), kind())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def levit() -> nn.Module:
    config = LevitConfig(
        image_size=32,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        num_labels=3,
    )
    return LevitForImageClassification(config)


KINDS = {
    **{kind.__name__: lambda kind=kind: Net(kind) for kind in (Lazily, ByDevice, AtEvaluation, ByPrompt, OfAChild, OfAChildByDevice, OfAChildAtEvaluation, OfAnother)},
    "LeViT": levit,
}  # fmt: skip
INPUTS = {"LeViT": (4, 3, 32, 32)}


@pytest.fixture(params=KINDS)
def case(request):
    base = seeded(KINDS[request.param])
    models = pool_of(base)
    for model in models.values():  # as loaded: nothing worked out of other weights
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        model.train().eval()
    x = torch.randn(INPUTS.get(request.param, (4, 4)))
    return models, x


def close(found: Tensor, expected: Tensor) -> None:
    """But for rounding of other sizes of a batch; tasks are apart by far more."""
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def run(model: nn.Module, *args: Tensor, **task) -> Tensor:
    found = model(*args, **task)
    return found if isinstance(found, Tensor) else found.logits


def test_a_task_that_is_set_is_not_run_with_what_another_left(case):
    models, x = case
    model = exact_model(models)
    for task in ("a", "b", "a"):
        model.set_task(task)
        close(run(model, x), run(models[task], x))
        close(run(model.materialize("b"), x), run(models["b"], x))
    model.unset_task()
    close(run(model.backbone, x), run(models[BASE], x))


def test_nor_is_a_batch_of_several_and_it_leaves_nothing_itself(case):
    models, x = case
    model, tasks = exact_model(models), ["b", "a", "b", None]
    for before in (None, "a"):
        if before:
            model.set_task(before)
        first = state_of(model.backbone)
        found = run(model, x, task_ids=tasks)
        for i, task in enumerate(tasks):
            close(found[i : i + 1], run(models[task or BASE], x[i : i + 1]))
        assert unchanged(first, model.backbone)
        close(run(model.backbone, x), run(models[before or BASE], x))


def test_the_same_samples_under_other_tasks_are_run_again(case):
    models, x = case
    model = exact_model(models)
    for tasks in (["a", "a", "b", "b"], ["a", "b", "b", "b"]):
        found = run(model, x, task_ids=tasks)
        for i, task in enumerate(tasks):
            close(found[i : i + 1], run(models[task], x[i : i + 1]))


def test_a_base_model_that_ran_before_the_merge_leaves_nothing_that_it_drops_itself():
    for kind in (ByDevice, AtEvaluation):
        models, x = pool_of(seeded(lambda: Net(kind))), torch.randn(4, 4)
        run(models[BASE], x)
        model = exact_model(models)
        model.set_task("a")
        close(run(model, x), run(models["a"].train().eval(), x))


def test_a_module_goes_through_training_once_per_switch_and_not_where_that_does_nothing():
    times = []

    class Counting(AtEvaluation):
        def train(self, mode: bool = True) -> "Counting":
            times.append(mode)
            return super().train(mode)

    class Around(nn.Sequential):
        def train(self, mode: bool = True) -> "Around":
            times.append("around")
            return super().train(mode)

    base = seeded(lambda: Around(nn.Linear(4, 4), Counting()))
    model = exact_model(pool_of(base))
    times.clear()
    model.set_task("a")
    assert times.count("around") == 2
    times.clear()
    for _ in range(2):
        run(model, torch.randn(4, 4))
        model.set_task("a")
    assert not times
