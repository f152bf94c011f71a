"""Laws of tasks that come and go: others to the bit, no byte beyond the budget, what is removed leaves no trace."""

import copy

import pytest
import torch
from helpers import BASE, didi, fine_tuned, floats, same_bits
from shared_forms import values
from torch import nn
from tucker_models import linears

from fusion_bench_didi.deltas.plain import DenseDelta, LowRankDelta, OwnDelta
from fusion_bench_didi.deltas.tucker import Bases, Core
from fusion_bench_didi.editing import add_task, remove_task
from fusion_bench_didi.errors import (
    BudgetError,
    CheckpointMismatchError,
    DiDiError,
    ModelPoolError,
    NonFiniteError,
    SettingsError,
    UnknownTaskError,
)
from fusion_bench_didi.merging.settings import Budget, MergeSettings
from fusion_bench_didi.models import DiDiModel
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.routers.files import make_router

#: shared parts of all forms
SETTINGS = [
    {"budget": 0.3, "factor_dtype": "auto"},
    {"budget": 0.3, "factor_dtype": "int4", "shared": "subspaces"},
    {"budget": 0.9, "shared": "mean", "residual": "full"},
    {"budget": 0.6, "factor_dtype": "bfloat16", "vectors": "shared"},
]


def alike(base: nn.Module, seed: int, *, noise: float = 0.02) -> nn.Module:
    """Fine-tuned models that use few rows and columns in common, in ways of their own, and have a part in common."""
    model, common = copy.deepcopy(base), torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            flat = value.flatten(1) if value.ndim > 1 else value[None]
            m, n = flat.shape
            left, right = (torch.randn(s, generator=common) for s in ((m, 3), (3, n)))
            core = torch.randn(3, 3, generator=own) + 0.5
            change = left @ core @ right + noise * torch.randn(m, n, generator=own)
            value += 0.02 * change.view_as(value)
    return model


@pytest.fixture(scope="module")
def models(make_tiny_clip):
    base = make_tiny_clip(()).base
    return {BASE: base, **{t: alike(base, s) for s, t in enumerate("abcd", 1)}}


def error_of(model, task, tuned, base, names=None):
    """Energy of a task vector that is not reproduced."""
    found, base = floats(model.materialize(task)), floats(base)
    tuned = {n: v for n, v in floats(tuned).items() if names is None or n in names}
    lost = sum(float((found[n] - v).double().square().sum()) for n, v in tuned.items())
    whole = sum(float((base[n] - v).double().square().sum()) for n, v in tuned.items())
    return lost / whole


def three(models, **settings):
    return didi({t: models[t] for t in (BASE, *"abc")}, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_others_stay_to_the_bit_and_a_task_that_goes_leaves_nothing(models, settings):
    model = three(models, **settings)
    before, account = values(model), model.storage
    model.set_task("b")
    found = add_task(model, models["d"], "d", budget=0.1)
    assert found.model is model and model.tasks == [*"abcd"]
    assert all(same_bits(before[t], floats(model.materialize(t))) for t in before)
    # what is stored is what is paid for
    added = model.storage.expert_bits["d"]
    assert 0 < added <= 0.1 * model.unit_bits
    assert added == sum(d.bits for d in model.modulators["d"].deltas.values())
    assert model.storage.shared_bits == account.shared_bits
    # and as good as it says
    told = error_of(model, "d", models["d"], models[BASE])
    assert found.facts["relative_error"] == pytest.approx(told, rel=0.02, abs=1e-6)
    gone = remove_task(model, "d")
    assert model.storage == account and gone.facts["freed_bits"] == added
    after = values(model)
    assert all(same_bits(before[t], after[t]) for t in before)


@pytest.mark.parametrize("precision", ["auto", "int4", "float32"])
def test_a_task_uses_the_bases_that_are_there(precision):
    models = linears()
    new, budget = models.pop("7"), 0.4 if precision == "float32" else 0.1
    model = didi(models, budget=budget, factor_dtype=precision, shared="auto")
    alone = didi(models, budget=budget, factor_dtype=precision, shared="none")
    assert isinstance(model.shared["weight"], Bases) and not len(alone.shared)
    errors = []
    for one in (model, alone):
        add_task(one, new, "7", budget=budget / 7)
        errors.append(error_of(one, "7", new, models[BASE]))
    assert isinstance(model.modulators["7"].deltas["weight"], Core)
    # without bases it has to pay for its directions by itself
    assert errors[0] < 0.5 * errors[1]
    # and it is served as well as those that the bases were made for
    others = [error_of(model, t, models[t], models[BASE]) for t in "0123456"]
    assert errors[0] < 1.2 * max(others)


def test_more_budget_loses_less():
    models = linears()
    new = models.pop("7")
    model, errors = didi(models, budget=0.2, factor_dtype="auto"), []
    for budget in (0.01, 0.02, 0.5):
        add_task(model, new, "7", budget=budget)
        errors.append(error_of(model, "7", new, models[BASE]))
        remove_task(model, "7")
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_directories_are_edited_as_models_are(models, tmp_path):
    model = three(models, budget=0.3, factor_dtype="auto")
    model.save_pretrained(tmp_path / "three")
    base = copy.deepcopy(models[BASE])
    files = {f.name: f.read_bytes() for f in (tmp_path / "three").iterdir()}
    place, four = tmp_path / "three", tmp_path / "four"
    with pytest.raises(SettingsError, match="written nowhere"):
        add_task(place, models["d"], "d", budget=0.1, backbone=base)
    found = add_task(
        place, models["d"], "d", budget=0.1, backbone=base, output_dir=four
    )
    assert found.directory == four
    add_task(model, models["d"], "d", budget=0.1)
    again = DiDiModel.from_pretrained(four, copy.deepcopy(models[BASE]))
    assert values(again).keys() == values(model).keys()
    assert again.storage == model.storage
    assert again.info["parents"]["d"] is None and again.info["tensors"]["d"]["merged"]
    remove_task(four, "d", overwrite=True)
    third = DiDiModel.from_pretrained(four, copy.deepcopy(models[BASE]))
    assert [e["operation"] for e in third.info["edits"]] == ["add", "remove"]
    name = "model.safetensors"
    assert (four / name).read_bytes() == files[name]
    assert {f.name: f.read_bytes() for f in place.iterdir()} == files
    page = (four / "README.md").read_text()
    assert "| d |" not in page and "Edited after the merge: add d, remove d." in page
    assert third.info["edits"][1]["directories"] == [str(four)]


def test_a_checkpoint_may_be_a_directory_or_an_adapter(
    tiny_clip, tiny_clip_dir, tmp_path
):
    pool = {k: v for k, v in tiny_clip.pool_models().items() if k != "svhn"}
    model = didi(pool, budget=0.3)
    other = copy.deepcopy(model)
    add_task(model, tiny_clip_dir / "svhn", "svhn", budget=0.2)
    add_task(other, tiny_clip.tuned["svhn"], "svhn", budget=0.2)
    assert same_bits(*(floats(m.materialize("svhn")) for m in (model, other)))
    assert model.info["parents"]["svhn"] == str(tiny_clip_dir / "svhn")


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2]], ids=str)
def test_an_adapter_stays_factored_beside_what_is_shared(models, settings, tmp_path):
    peft = pytest.importorskip("peft")
    model = three(models, **settings)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], lora_alpha=4)
    adapted = peft.get_peft_model(copy.deepcopy(models[BASE]), config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
                value *= 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    add_task(model, tmp_path / "adapter", "lora", budget=3.0)
    expected = floats(adapted.merge_and_unload())
    for name, value in floats(model.materialize("lora")).items():
        torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=0)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2]], ids=str)
def test_an_adapter_with_dora_changes_the_base_model_and_not_what_is_shared(
    models, settings, tmp_path
):
    peft = pytest.importorskip("peft")
    model = three(models, **settings)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], use_dora=True)
    adapted = peft.get_peft_model(copy.deepcopy(models[BASE]), config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "magnitude" in name:
                value *= 1.5
    adapted.save_pretrained(tmp_path / "adapter")
    add_task(model, tmp_path / "adapter", "lora", budget=3.0)
    expected = floats(adapted.merge_and_unload())
    for name, value in floats(model.materialize("lora")).items():
        torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=0)


def test_heads_of_a_tasks_own_come_and_go():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    models = {BASE: base, **{t: fine_tuned(base, s) for s, t in enumerate("ab", 1)}}
    model = didi(models, budget=0.9)
    other = fine_tuned(base, 5)
    other[1] = nn.Linear(8, 7)
    add_task(model, other, "c", budget=2.0, own=["1.*"])
    assert isinstance(model.modulators["c"].deltas["1.weight"], OwnDelta)
    model.set_task("c")
    assert model.backbone[1].weight.equal(other[1].weight)
    assert model(torch.randn(2, 8)).shape == (2, 7)
    remove_task(model, "c")
    model.set_task("a")
    assert model(torch.randn(2, 8)).shape == (2, 3)


def test_bases_without_cores_are_dropped_and_sums_stay():
    shape = (8, 8)
    bases = didi(linears(), budget=0.1, shared="subspaces", factor_dtype="int4")
    for task in "234567":
        remove_task(bases, task)
    assert isinstance(bases.shared["weight"], Bases)
    del bases.modulators["1"].deltas["weight"]
    before = floats(bases.materialize("1"))
    assert remove_task(bases, "0").facts["unshared"] == ["weight"]
    assert same_bits(before, floats(bases.materialize("1")))
    assert bases.storage.excl_bits == 0
    added = DynamicModel(
        nn.Linear(8, 8, bias=False),
        {"weight": DenseDelta(shape, torch.ones(shape))},
        {t: {} for t in "ab"},
        unit_bits=64 * 32,
    )
    remove_task(added, "a")
    assert added.shared["weight"] is not None
    with pytest.raises(DiDiError, match="only task"):
        remove_task(added, "b")


def test_what_cannot_be_added_or_removed_changes_nothing(models, tmp_path):
    model = three(models, budget=0.3)
    before, storage = values(model), model.storage
    broken, other = copy.deepcopy(models["d"]), nn.Linear(3, 3)
    with torch.no_grad():
        next(broken.parameters())[0] = float("nan")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    refused = [
        (ModelPoolError, "already", models["d"], {"name": "A"}),
        (ModelPoolError, "no name", models["d"], {"name": "_x"}),
        (ModelPoolError, "no/such/model does not exist", "no/such/model", {}),
        (ModelPoolError, "zero", copy.deepcopy(models[BASE]), {}),
        (NonFiniteError, "NaN", broken, {}),
        (CheckpointMismatchError, "architecture", other, {}),
        (BudgetError, "too small", models["d"], {"budget": 1e-4}),
        (BudgetError, "leaves nothing", models["d"], {"budget": 0}),
        (FileExistsError, "exists", models["d"], {"output_dir": tmp_path / "there"}),
        (SettingsError, "output_dir", models["d"], {"overwrite": True}),
        (SettingsError, "no tensor matches", models["d"], {"exclude": "no.such"}),
    ]
    for kind, text, checkpoint, changed in refused:
        options = {"name": "d", "budget": 0.1, **changed}
        with pytest.raises(kind, match=text):
            add_task(model, checkpoint, **options)
    assert model.storage == storage
    with pytest.raises(UnknownTaskError, match="'no'.*'a', 'b', 'c'"):
        remove_task(model, "no")
    for edit in (
        lambda **o: add_task(model, models["d"], "d", budget=0.1, **o),
        lambda **o: remove_task(model, "d", **o),
    ):
        model.attach_router(make_router("oracle", model.tasks))
        before, storage = values(model), model.storage
        with pytest.raises(DiDiError, match="has a router"):
            edit()
        assert model.storage == storage
        assert all(same_bits(before[t], floats(model.materialize(t))) for t in before)
        edit(drop_router=True)


def test_bounds_on_ranks_hold_together_with_what_is_shared():
    """A task's change stays what an adapter of that rank carries."""
    models = linears()
    up, down = torch.randn(64, 3), torch.randn(3, 64)
    part = LowRankDelta((64, 64), up, down)
    model = DiDiModel(models[BASE], {"weight": part}, {"0": {}}, unit_bits=64 * 64 * 32)
    bound = MergeSettings(Budget(1.0), max_rank=6, vectors="pretrained")
    add_task(model, models["7"], "7", budget=0.5, settings=bound)
    assert model.modulators["7"].deltas["weight"].own_product().rank == 3
    assert model.modulators["7"].deltas["weight"].product(part).rank == 6
