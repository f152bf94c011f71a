"""Copies that run their own weights, whatever was put on the modules they are copies of."""

import copy
import functools
import types
import weakref

import pytest
import torch
from exact_models import exact_model, pool_of, seeded
from fusion_bench.modelpool import (
    BaseModelPool,
    ConvNextForImageClassificationPool,
    Dinov2ForImageClassificationPool,
    ResNetForImageClassificationPool,
)
from helpers import BASE, didi, fine_tuned, floats, same_bits
from mixed_net import Net, close
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel
from fusion_bench_didi.serving.copies import adopted, deep_copy

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# --- the host's pools ---------------------------------------------------------------


def _resnet(labels: int):
    sides = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = ResNetConfig(**sides, layer_type="basic", num_labels=labels)
    return ResNetForImageClassification(config)


def _convnext(labels: int):
    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=labels
    )
    return ConvNextForImageClassification(config)


def _dinov2(labels: int):
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        num_labels=labels,
    )
    return Dinov2ForImageClassification(config)


POOLS = {
    "resnet": (_resnet, ResNetForImageClassificationPool, {"type": "transformers"}),
    "convnext": (_convnext, ConvNextForImageClassificationPool, {}),
    "dinov2": (_dinov2, Dinov2ForImageClassificationPool, {}),
}
LABELS = {"a": 3, "b": 3, "more": 5}


def pool_on_disk(name: str, directory) -> BaseModelPool:
    """Every entry a directory of ``from_pretrained``, with statistics and numbers of classes of its own."""
    make, kind, options = POOLS[name]
    base = seeded(lambda: make(3))
    base.save_pretrained(directory / BASE)
    for seed, (task, labels) in enumerate(LABELS.items(), 1):
        tuned = seeded(lambda: make(labels))
        tuned.base_model.load_state_dict(fine_tuned(base.base_model, seed).state_dict())
        for key, buffer in tuned.named_buffers():
            if "running_var" in key:
                buffer.fill_(1.0 + seed)
        tuned.save_pretrained(directory / task)
    entries = {n: {"config_path": str(directory / n)} for n in (BASE, *LABELS)}
    return kind(models=entries, **options)


@pytest.mark.parametrize("name", POOLS)
def test_pools_whose_forward_is_a_closure(name, tmp_path):
    pool = pool_on_disk(name, tmp_path)
    plain = {task: pool.load_model(task).eval() for task in (BASE, *LABELS)}
    expected = {task: model(PIXELS).detach() for task, model in plain.items()}
    merged = didi(pool, budget=1e9).eval()
    assert "forward" in vars(merged.backbone), "the kind that this test is of"
    merged.save_pretrained(tmp_path / "merged")
    again = DiDiModel.from_pretrained(tmp_path / "merged", pool.load_model(BASE)).eval()
    for model in (merged, again, copy.deepcopy(merged)):
        for task, labels in LABELS.items():
            model.set_task(task)
            close(model(PIXELS), expected[task])
            assert model(PIXELS).shape == (4, labels)
        single = {task: model.materialize(task).eval() for task in LABELS}
        for task, one in single.items():
            close(one(PIXELS), expected[task])
            with torch.no_grad():
                (
                    one.classifier[-1].bias.zero_()
                    if name == "resnet"
                    else one.classifier.bias.zero_()
                )
            close(one(PIXELS).mean(0), expected[task].mean(0), atol=10)
        close(model(PIXELS), expected["more"])  # still the task that is set
        tasks = ["b", "a", None, "b"]
        found = model(PIXELS, task_ids=tasks)
        for i, task in enumerate(tasks):
            close(found[i], expected[task or BASE][i])
        model.unset_task()
    single = merged.materialize("more")
    single.save_pretrained(tmp_path / "single")
    loaded = type(single).from_pretrained(tmp_path / "single").eval()
    close(loaded(PIXELS).logits, expected["more"])
    assert same_bits(floats(loaded), floats(single))


# --- functions on modules -----------------------------------------------------------


class TwoWays(Net):
    def other(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


def by_closure(model):
    inner = model.forward
    model.forward = lambda x: inner(x) * 2


def by_closure_over_parts(model):
    parts = [model.first, {"last": model.last}]
    model.forward = lambda x: parts[1]["last"](parts[0](x))


def by_nested_closures(model):
    def outer(function):
        def inner(x):
            return function(x) + model.last.bias

        return inner

    model.forward = outer(outer(model.forward))


def by_a_method_of_another_name(model):
    model.forward = model.other


def by_a_bound_function(model):
    model.forward = types.MethodType(lambda self, x: self.last(x) - 1, model)


def by_a_partial(model):
    model.forward = functools.partial(TwoWays.forward, model)


def by_a_wrapper(model):
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs) + 1

    model.forward = forward


def by_accelerate(model):
    """As its hooks do."""
    model._old_forward = model.forward
    new = functools.partial(lambda module, x: module._old_forward(x), model)
    model.forward = functools.update_wrapper(new, model._old_forward)


def by_defaults(model):
    model.forward = lambda x, module=model, *, last=model.last: last(module.first(x))


def by_parameters(model):
    weight, bias = model.last.weight, model.last.bias
    model.forward = lambda x: model.first(x) @ weight.mT + bias


def by_a_list_of_parameters(model):
    model.__dict__["weights"] = [model.last.weight, model.last.bias]
    function = lambda self, x: nn.functional.linear(self.first(x), *self.weights)
    model.forward = types.MethodType(function, model)


def by_an_adapter(model):
    inner, down = model.last.forward, torch.ones(6, 1)
    model.last.forward = lambda x: inner(x) + (x @ down)


def by_the_compiler(model):
    model.forward = torch.compile(model.forward, backend="eager")


def by_its_own_compiler(model):
    model.compile(backend="eager")


def by_a_hook(model):
    inner = model.last
    model.first.register_forward_hook(lambda _, args, y: y + inner.weight.sum())


def by_a_list_of_modules(model):
    model.__dict__["parts"] = [model.first, model.last]
    model.forward = types.MethodType(
        lambda self, x: self.parts[1](self.parts[0](x)), model
    )


def by_a_weak_reference(model):
    model.first.__dict__["parent"] = weakref.ref(model)
    function = (
        lambda self, x: nn.functional.linear(x, self.weight)
        * self.parent().last.bias.sum()
    )
    model.first.forward = types.MethodType(function, model.first)


WAYS = {k: f for k, f in list(globals().items()) if k.startswith("by_")}


def replaced(way: str, tasks: tuple[str, ...] = ("a", "b")) -> dict[str, nn.Module]:
    """Models of which every one had its forward replaced after it was made."""
    models = pool_of(seeded(TwoWays), tasks)
    for model in models.values():
        WAYS[way](model)
    return models


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_copy_runs_its_own_modules(way):
    models = replaced(way)
    for task in "ab":
        expected = models[task](X)
        twin = deep_copy(models[task])
        close(twin(X), expected)
        for value in twin.parameters():
            value.zero_()
        close(models[task](X), expected)
        assert not torch.allclose(twin(X), expected)
        own = [p for p in twin.parameters()]
        assert not {id(p) for p in own} & {id(p) for p in models[task].parameters()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["taken over", "copied before", "copied by torch"])
@torch.no_grad()
def test_a_merged_model_runs_the_tasks_whatever_was_put_on_its_backbone(way, how):
    """The base model may be taken over as it is, or be a copy that still runs the original."""
    models = replaced(way)
    built = exact_model(pool_of(seeded(TwoWays)))
    base = models[BASE] if how == "taken over" else copy.deepcopy(models[BASE])
    experts = {t: dict(e.deltas.items()) for t, e in built.modulators.items()}
    model = DynamicModel(base, {}, experts, unit_bits=1).eval()
    if how == "copied by torch":
        model = copy.deepcopy(model)
    expected = {t: models[t](X) for t in (BASE, "a", "b")}
    for task in ("a", "b", "a"):
        model.set_task(task)
        close(model(X), expected[task])
        close(model.materialize("b")(X), expected["b"])
        close(copy.deepcopy(model)(X), expected[task])
    model.unset_task()
    close(model.backbone(X), expected[BASE])
    tasks = ["a", "b", None, "b", "a"]
    before = {name: vars(m).copy() for name, m in model.backbone.named_modules()}
    found = model(X, task_ids=tasks)
    for i, task in enumerate(tasks):
        close(found[i], expected[task or BASE][i])
    for name, module in model.backbone.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(value is before[name][key] for key, value in vars(module).items())


def test_an_original_that_several_parts_could_be_copies_of_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.load_state_dict(self.one.state_dict())

    original = seeded(Twice)
    part = original.one
    original.forward = lambda x: part(x)
    with pytest.raises(DiDiError, match="2 modules are equal"):
        adopted(copy.deepcopy(original))


def test_other_models_that_a_function_runs_are_left_alone():
    teacher = seeded(lambda: nn.Linear(6, 3))
    model = seeded(TwoWays)
    inner = model.forward
    model.forward = lambda x: inner(x) + teacher(x)
    twin = deep_copy(model)
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
    close(twin(X), teacher(X))
    assert adopted(model) is model


def test_what_cannot_be_rebound_is_refused_by_name():
    models = pool_of(seeded(TwoWays))
    model = exact_model(models)
    backbone = model.backbone

    @functools.lru_cache
    def cached(scale):
        return backbone.last(torch.ones(1, 6)) * scale

    backbone.last.forward_once = cached
    with pytest.raises(DiDiError, match=r"still run the original.* last \(Linear\)"):
        model.materialize("a")
    with pytest.raises(DiDiError, match="still run the original"):
        copy.deepcopy(model)
    del backbone.last.forward_once
    globals()["the_model"] = backbone
    backbone.forward = lambda x: the_model.last(x)  # noqa: F821
    with pytest.raises(DiDiError, match=r"the model itself \(TwoWays\)"):
        model.materialize("a")
    backbone.forward = backbone.other
    close(model.materialize("a")(X), models["a"].other(X))
    del globals()["the_model"]


def test_functions_on_classes_that_know_an_instance_are_refused():
    class Patched(TwoWays):
        pass

    model = seeded(Patched)
    Patched.forward = lambda self, x: model.last(x)
    with pytest.raises(DiDiError, match="the model itself"):
        deep_copy(model)


class Named(TwoWays):
    """Functions that know their class by a closure, with attributes that are called as a global may be."""

    def __init__(self):
        super().__init__()
        self.a_model = nn.Linear(3, 3)
        self.made_of = None if a_model is None else "another"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a_model(super().forward(x)) + self.last.bias

    def listed(self):
        super().train()
        return lambda: self.named_parameters()


a_model = None


@pytest.mark.parametrize("name", ["a_model", "bias", "named_parameters"])
def test_attributes_that_are_called_as_a_global_is_are_no_reference_to_it(
    name, monkeypatch
):
    """As in a notebook, whose base model is a global."""
    models = pool_of(seeded(Named))
    monkeypatch.setitem(globals(), name, models[BASE])
    model = didi(models, budget=1e6)
    close(model.materialize("a")(X), models["a"](X), atol=1e-3)


def test_a_global_that_a_function_or_one_inside_it_reads_is_one(monkeypatch):
    class Reads(TwoWays):
        def inside(self, x):
            super().forward(x)
            return lambda: a_model(x)

        def in_a_class(self):
            super().train()

            class Inner:
                last = a_model

            return Inner

    for left in ("inside", "in_a_class"):
        kind = type("Kind", (TwoWays,), {left: vars(Reads)[left]})
        model = seeded(kind)
        monkeypatch.setitem(globals(), "a_model", model)
        with pytest.raises(DiDiError, match="the model itself"):
            deep_copy(model)


def test_plain_models_are_copied_as_ever():
    models = pool_of(seeded(TwoWays))
    model = exact_model(models)
    one = model.materialize("a")
    assert vars(one).keys() == vars(models["a"]).keys()
    assert model.materialize("a")(X).equal(one(X))


class ListsNothing(nn.Module):
    """Lists fewer parameters than it holds, as models do that freeze some."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.ones(2))
        self.register_parameter("bias", None)

    def parameters(self):
        return iter(())

    buffers = parameters

    def forward(self, x):
        return self.scale(x)


@pytest.mark.parametrize("name", ["weight", "table"])
def test_tensors_that_a_model_does_not_list_are_rebound_too(name):
    model = ListsNothing()
    own = getattr(model, name)
    model.scale = lambda x: own * x
    twin = deep_copy(model)
    getattr(twin, name).data.fill_(3)
    assert twin(torch.ones(2)).tolist() == [3, 3]
    assert model(torch.ones(2)).tolist() == [1, 1]


def test_a_partial_that_refers_to_itself_is_copied():
    model = nn.Linear(2, 2)
    model.scale = functools.partial(torch.mul, model.weight)
    model.scale.itself = model.scale
    twin = deep_copy(model)
    assert twin.scale.args[0] is twin.weight
    assert twin.scale.itself is twin.scale
