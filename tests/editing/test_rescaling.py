"""Laws of smaller budgets: no byte beyond them, no less error than the optimum and hardly more, never more than the bound."""

import copy
import gc
import math
import re
import weakref

import pytest
from helpers import BASE, didi, family, floats, normal, same_bits
from saved_directories import listing
from torch import nn
from tucker_models import linears

from fusion_bench_didi.editing import add_task, remove_task, rescale, rescaling
from fusion_bench_didi.errors import BudgetError, DiDiError, SettingsError
from fusion_bench_didi.method.routed import fit_router_to
from fusion_bench_didi.models import DiDiModel
from fusion_bench_didi.routers.files import make_router


def distance(found, expected):
    """Squared norm between the tasks of two models, or of one and the checkpoints."""
    lost = 0.0
    for task in found.tasks:
        own = floats(found.materialize(task))
        if isinstance(expected, dict):
            other = floats(expected[task])
        else:
            other = floats(expected.materialize(task))
        lost += sum(
            float((own[n] - v).double().square().sum()) for n, v in other.items()
        )
    return lost


def check(models, before, budget, **settings):
    """Rescaled to a budget: the laws; returns the error over the optimum's."""
    model = copy.deepcopy(before)
    found = rescale(model, budget=budget)
    assert model.tasks == before.tasks
    assert 0.9 * budget < model.storage.x_excl <= budget
    stored = (
        *model.shared.values(),
        *(d for e in model.modulators.values() for d in e.deltas.values()),
    )
    assert model.storage.excl_bits == sum(d.bits for d in stored)
    assert found.after == model.storage and found.before == before.storage
    optimum = didi(
        {t: models[t] for t in (BASE, *before.tasks)}, budget=budget, **settings
    )
    lost, least = distance(model, models), distance(optimum, models)
    first, again = distance(before, models), distance(model, before)
    assert lost <= (math.sqrt(first) + math.sqrt(again)) ** 2 * (1 + 1e-6)
    base = DiDiModel(
        copy.deepcopy(models[BASE]), {}, {t: {} for t in before.tasks}, unit_bits=1
    )
    assert lost / distance(base, models) <= model.info["relative_error"] * 1.05
    # the errors of both steps are close to orthogonal
    assert lost <= 1.1 * (first + least)
    return lost / least


@pytest.mark.parametrize(
    "settings",
    [
        {"factor_dtype": "auto", "gain": "none"},
        {"factor_dtype": "int4", "shared": "subspaces"},
        {"shared": "mean"},
    ],
    ids=str,
)
def test_errors_of_both_steps_add_up(settings):
    models = linears(5)
    before = didi(models, budget=0.8, **settings)
    for budget in (0.4, 0.2):
        assert check(models, before, budget, **settings) > 0.98


@pytest.mark.parametrize("budget", [0.4, 0.2])
def test_directions_that_were_made_longer_lose_no_less_than_the_optimum(budget):
    """In as much storage: sizes of cores are few, and these come to fill the budget better than those of the checkpoints."""
    models, settings = linears(5), {"factor_dtype": "auto"}
    before = didi(models, budget=0.8, **settings)
    check(models, before, budget, **settings)
    model = copy.deepcopy(before)
    rescale(model, budget=budget)
    optimum = didi(models, budget=1.03 * budget, **settings)
    assert model.storage.excl_bits <= optimum.storage.excl_bits
    assert distance(model, models) > 0.98 * distance(optimum, models)


def test_whole_models_are_as_good_as_merged_at_that_budget(tiny_clip):
    """One of the tasks was added later."""
    models = tiny_clip.pool_models()
    some = {t: models[t] for t in (BASE, "mnist", "svhn")}
    before = didi(some, budget=0.5, factor_dtype="auto")
    add_task(before, models["eurosat"], "eurosat", budget=0.25)
    # what is coded twice is rounded twice
    assert 0.98 < check(models, before, 0.3, factor_dtype="auto") < 1.2


def test_directories_need_neither_backbone_nor_checkpoints(tmp_path):
    models = linears(3)
    model = didi(models, budget=0.8, factor_dtype="auto")
    model.attach_router(make_router("oracle", model.tasks))
    model.save_pretrained(tmp_path / "large")
    found = rescale(tmp_path / "large", budget=0.2, output_dir=tmp_path / "small")
    assert found.model is None
    rescale(model, budget=0.2)
    again = DiDiModel.from_pretrained(tmp_path / "small", copy.deepcopy(models[BASE]))
    assert again.storage == model.storage == found.after
    assert again.router.tasks == model.tasks and model.router is not None
    assert distance(again, model) < 1e-9 * distance(again, models)
    assert again.info["edits"][-1]["operation"] == "rescale"
    assert again.info["budget"] == 0.2
    # and again, and with a task less
    again.attach_router(None)
    rescale(again, budget=0.1)
    remove_task(again, "1")
    assert again.storage.x_excl < 0.1 and again.tasks == ["0", "2"]


class Net(nn.Sequential):
    """Two blocks of one layer."""

    def __init__(self):
        super().__init__(*(nn.Linear(32, 32, bias=False) for _ in range(2)))


def routed(kind: str, head: str) -> DiDiModel:
    """A model of two tasks with a router, fitted to a batch of each if it has a head."""
    model = didi(family(Net(), ("a", "b")), budget=1.0, factor_dtype="int4")
    options = {} if kind == "oracle" else {"head": head, "layers": ["0"]}
    model.attach_router(kind, **options)
    if head != "none":
        fit_router_to(model, [normal(9, 3, 32, seed=1), normal(9, 3, 32, seed=2)])
    return model


@pytest.mark.parametrize("head", ["none", "discriminant", "mlp"])
@pytest.mark.parametrize("kind", ["projection", "representation"])
def test_a_router_that_looks_at_the_experts_goes_if_it_may(kind, head, tmp_path):
    """Heads were fitted to the experts as they were; without one it may find no expert in its layers any more."""
    model = routed(kind, head)
    model.save_pretrained(tmp_path / "m")
    before, router, bits = model.storage, model.router, model.router.bits
    told = "has a router, which is for the experts that there are now. .*drop_router"
    for place in (model, tmp_path / "m"):
        with pytest.raises(DiDiError, match=told):
            rescale(place, budget=0.2, output_dir=tmp_path / "small")
    assert model.storage == before and model.router is router
    assert not (tmp_path / "small").exists()
    rescale(tmp_path / "m", budget=0.2, output_dir=tmp_path / "small", drop_router=True)
    found = rescale(model, budget=0.2, drop_router=True)
    again = DiDiModel.from_pretrained(tmp_path / "small", copy.deepcopy(model.backbone))
    for one in (model, again):
        assert one.router is None and one.storage == found.after
        assert one.storage.routing_bits == 0
    assert found.before.routing_bits == bits
    assert listing(tmp_path / "small") == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    "kind, head", [("mlp", "mlp"), ("mlp", "discriminant"), ("oracle", "none")]
)
def test_a_router_that_does_not_look_at_the_experts_stays(kind, head, tmp_path):
    model = routed(kind, head)
    model.save_pretrained(tmp_path / "m")
    tensors, bits = model.router.tensors(), model.router.bits
    budget = (bits + model.storage.excl_bits) / 2 / model.unit_bits
    rescale(model, budget=budget)
    found = rescale(tmp_path / "m", budget=budget, output_dir=tmp_path / "small")
    again = DiDiModel.from_pretrained(tmp_path / "small", copy.deepcopy(model.backbone))
    for one in (model, again):
        assert same_bits(one.router.tensors(), tensors)
        assert one.storage == found.after and one.storage.x_excl <= budget
        assert one.storage.routing_bits == one.router.bits


def test_a_router_that_goes_leaves_its_bits(tmp_path):
    """It may take more than the budget."""
    model = routed("mlp", "discriminant")
    budget = 0.15
    assert model.router.bits > budget * model.unit_bits
    with pytest.raises(BudgetError, match="and the router, alone take"):
        rescale(model, budget=budget)
    model.save_pretrained(tmp_path / "m")
    found = rescale(tmp_path / "m", budget=budget, overwrite=True, drop_router=True)
    rescale(model, budget=budget, drop_router=True)
    assert model.router is None and model.storage == found.after
    assert 0.9 * budget < found.after.x_excl <= budget


def test_tensors_of_a_tasks_own_stay_as_they_are():
    base = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))
    models = {BASE: base}
    for task, model in linears(3, side=32).items():
        if task != BASE:
            models[task] = nn.Sequential(
                nn.Linear(32, 32), nn.Linear(32, 3 + int(task))
            )
            models[task][0].load_state_dict(base[0].state_dict())
            models[task][0].weight.data += model.weight.data
    model = didi(models, budget=1.2, own=["1.*"], factor_dtype="auto")
    rescale(model, budget=0.6)
    assert model.storage.x_excl <= 0.6
    for task in model.tasks:
        assert model.materialize(task)[1].weight.equal(models[task][1].weight)
    with pytest.raises(BudgetError, match="as they are"):
        rescale(model, budget=0.1)


def test_what_is_no_smaller_is_refused(tmp_path):
    model = didi(linears(3), budget=0.3, factor_dtype="auto")
    storage = model.storage
    for budget in (0.3, 5.0, math.inf):
        with pytest.raises(BudgetError, match="no smaller"):
            rescale(model, budget=budget)
    with pytest.raises(BudgetError, match="leaves nothing"):
        rescale(model, budget=0.0)
    model.save_pretrained(tmp_path / "there")
    with pytest.raises(SettingsError, match="written nowhere"):
        rescale(tmp_path / "there", budget=0.1)
    with pytest.raises(FileNotFoundError):
        rescale(tmp_path / "nothing", budget=0.1, output_dir=tmp_path / "out")
    assert model.storage == storage and not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [1e-9, 1e-3])
def test_a_budget_that_holds_nothing_is_refused_with_one_that_does(budget):
    model = didi(linears(), budget=0.5, factor_dtype="auto", allocation="greedy")
    before = model.storage
    with pytest.raises(BudgetError, match="nothing of any task fits") as refusal:
        rescale(model, budget=budget)
    assert model.storage == before
    (named,) = re.findall(r"takes (\d+\.\d+)", str(refusal.value))
    assert rescale(model, budget=float(named)).after.excl_bits > 0


@pytest.mark.parametrize("before, after", [(0.2, 0.15), (0.3, 0.15)])
def test_codes_of_codes_use_the_budget(monkeypatch, before, after):
    """They are of few values, which take far less at a step than at one a little finer."""
    base = nn.Linear(32, 32, bias=False)
    models = {BASE: base}
    for seed in (1, 2, 3):
        models[str(seed)] = tuned = copy.deepcopy(base)
        tuned.weight.data += 0.1 * normal(32, 32, seed=seed)
    model = didi(models, budget=before, factor_dtype="auto")
    found = []
    for tries in (1, rescaling.TRIES):
        monkeypatch.setattr(rescaling, "TRIES", tries)
        one = copy.deepcopy(model)
        rescale(one, budget=after)
        assert one.storage.x_excl <= after
        assert one.info["settings"]["budget"]["ratio"] == pytest.approx(after, rel=1e-3)
        found.append((one.storage.x_excl, distance(one, models)))
    (once, more), (used, lost) = found
    assert once < 0.85 * after and used > 1.1 * once and lost < 0.95 * more


def test_what_was_before_is_not_kept():
    """Readers of old experts referred to themselves, and kept them beside the new ones until garbage was looked for."""
    model = didi(linears(), budget=1.0)
    old = [weakref.ref(d) for e in model.modulators.values() for d in e.deltas.values()]
    gc.collect()
    gc.disable()
    try:
        rescale(model, budget=0.3)
        assert old and not any(ref() is not None for ref in old)
    finally:
        gc.enable()
