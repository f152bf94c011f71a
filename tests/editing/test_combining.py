"""Laws of models that are combined: outputs of all tasks as before, what is shared stored once, one base model."""

import copy

import pytest
import torch
from helpers import BASE, didi, fine_tuned, floats, normal, same_bits
from safetensors.torch import load_file
from shared_forms import FORMS, base, model_of, values
from torch import nn
from tucker_models import linears

from fusion_bench_didi.checkpoint.deltas import read_config
from fusion_bench_didi.deltas.grouped import GroupedDelta
from fusion_bench_didi.deltas.plain import DenseDelta
from fusion_bench_didi.editing import (
    AdapterLibrary,
    add_task,
    combine,
    load_tasks,
    remove_task,
    rescale,
)
from fusion_bench_didi.editing.combining import check_entries
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError, SettingsError
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.serving.banks import Serving


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_outputs_are_as_before_for_all_forms(first, second, tmp_path):
    one, other = model_of(first, 0, "abc"), model_of(second, 100, "xyz")
    expected = values(one) | values(other)
    bits = one.storage.excl_bits + other.storage.excl_bits
    for name, model in (("one", one), ("other", other)):
        model.save_pretrained(tmp_path / name)
    places = tmp_path / "one", tmp_path / "other", tmp_path / "both"
    combine(places[0], places[1], output_dir=places[2])
    loaded = DiDiModel.from_pretrained(places[2], base())
    other.set_task("x")
    found = combine(one, other)
    assert values(other).keys() == {*"xyz"}
    for model in (one, loaded):
        assert model.tasks == [*"abcxyz"]
        assert all(same_bits(v, expected[t]) for t, v in values(model).items())
        # nothing is stored twice
        assert model.storage.excl_bits == bits == found.after.excl_bits
        x = normal(7, 6, seed=5)
        for serving in (Serving(), Serving(memory_limit_gb=0), Serving(0.5, 0)):
            model.serving = serving
            mixed = model(x, task_ids=[*model.tasks, None])
            for i, task in enumerate(model.tasks):
                alone = model.materialize(task)(x[i : i + 1])
                torch.testing.assert_close(mixed[i : i + 1], alone)
    size = sum(v.nbytes for v in load_file(places[2] / "model.safetensors").values())
    assert 8 * size == bits
    grouped = any(
        isinstance(d, GroupedDelta) for d in one.modulators["x"].deltas.values()
    )
    assert read_config(places[2])["format"] == (3 if grouped else 2)
    some = load_tasks(places[2], ["y", "b"], base())
    assert all(same_bits(v, expected[t]) for t, v in values(some).items())
    # whoever goes takes along what was theirs
    for task in "xyz":
        remove_task(loaded, task)
    assert loaded.storage.shared_bits == model_of(first, 0, "abc").storage.shared_bits
    assert all(same_bits(v, expected[t]) for t, v in values(loaded).items())


def test_what_is_shared_alike_stays_shared():
    models = linears()
    whole = didi(models, budget=0.1, shared="subspaces", factor_dtype="int4")
    assert len(whole.shared)
    halves = [copy.deepcopy(whole), copy.deepcopy(whole)]
    for half, gone in zip(halves, ("34567", "012")):
        for task in gone:
            remove_task(half, task)
    storage = whole.storage
    found = combine(*halves)
    assert found.after.excl_bits == storage.excl_bits and not found.facts["apart"]
    after = values(halves[0])
    assert all(same_bits(v, after[t]) for t, v in values(whole).items())


def test_facts_are_of_both():
    """What is told of tasks is told of all of them, and a budget is of one merge."""
    settings = {"shared": "mean", "factor_dtype": "auto"}
    halves = [didi(model, budget=0.4, **settings) for model in (linears(3), more())]
    found = combine(*halves).model
    assert found.info["relative_errors"].keys() == {*found.tasks}
    assert "budget" not in found.info and "budget" not in repr(found)


def more() -> dict:
    """Other tasks of the same base model."""
    models = linears(6)
    return {name: models[name] for name in (BASE, "3", "4", "5")}


def test_three_models_and_what_can_be_done_next(tmp_path):
    parts = [model_of("dense", 50 * i, t) for i, t in enumerate(("abc", "def", "ghi"))]
    expected = {t: v for part in parts for t, v in values(part).items()}
    pair = combine(parts[1], parts[2]).model
    three = combine(parts[0], pair).model
    assert all(same_bits(v, expected[t]) for t, v in values(three).items())
    three.save_pretrained(tmp_path / "three")
    again = DiDiModel.from_pretrained(tmp_path / "three", base())
    twin = copy.deepcopy(again)
    assert all(same_bits(v, expected[t]) for t, v in values(twin).items())
    assert again.storage == three.storage
    add_task(again, fine_tuned(base(), 3), "new", budget=2.0)
    rest = values(again)
    assert all(same_bits(rest[t], v) for t, v in expected.items())
    rescale(again, budget=0.6 * again.storage.x_excl)
    assert not any(
        isinstance(d, GroupedDelta)
        for e in again.modulators.values()
        for d in e.deltas.values()
    )


def test_what_does_not_go_together_is_refused(tmp_path):
    one = model_of("dense", 0, "abc")
    storage = one.storage
    with pytest.raises(DiDiError, match="'b' and 'B'"):
        combine(one, model_of("dense", 1, "xBz"))
    other = model_of("bases", 0, "xyz")
    with torch.no_grad():
        other.backbone[1].weight += 1
    with pytest.raises(CheckpointMismatchError, match="one base model.*1.weight"):
        combine(one, other)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointMismatchError, match="one base model.*1.weight"):
        combine(tmp_path / "one", tmp_path / "other", output_dir=tmp_path / "out")
    with pytest.raises(SettingsError, match="two of a kind"):
        combine(one, tmp_path / "other")
    right = model_of("bases", 0, "xyz")
    right.attach_router(make_router("oracle", right.tasks))
    with pytest.raises(DiDiError, match="has a router"):
        combine(one, right)
    assert one.storage == storage and not (tmp_path / "out").exists()
    assert isinstance(combine(one, right, drop_router=True).model, DynamicModel)
    with pytest.raises(DiDiError, match="cannot be edited"):
        remove_task(nn.Linear(2, 2), "a")


def in_type(dtype: torch.dtype, task: str) -> DiDiModel:
    """On a base model whose values are those of bfloat16, in a type."""
    experts = {task: {"0.weight": DenseDelta((6, 6), normal(6, 6))}}
    return DiDiModel(base().bfloat16().to(dtype), {}, experts, unit_bits=36 * 32)


@pytest.mark.parametrize("where", ["memory", "directories", "library"])
@pytest.mark.parametrize("wide_first", [True, False])
def test_base_models_in_two_types_do_not_go_together(where, wide_first, tmp_path):
    """Their values are the same, and what tasks make of them is not."""
    types = [torch.bfloat16, torch.float32]
    models = [in_type(t, f"{t}") for t in (types[::-1] if wide_first else types)]
    if where == "directories":
        places = [tmp_path / str(i) for i in range(2)]
        for place, model in zip(places, models):
            model.save_pretrained(place)
    with pytest.raises(CheckpointMismatchError, match="bfloat16.*in one data type"):
        if where == "library":
            library = AdapterLibrary(tmp_path / "library")
            library.add(models[0])
            library.add(models[1])
        elif where == "directories":
            combine(*places, output_dir=tmp_path / "both")
        else:
            combine(*models)


def test_base_models_that_compute_something_else_do_not_go_together():
    entry = {"class": "Net", "tensors": {"weight": "1"}, "computes": {"eps": 1e-5}}
    check_entries(entry, {**entry, "computes": {"other": 1}}, names="ab")
    other = {**entry, "computes": {"eps": 1e-6}}
    with pytest.raises(
        CheckpointMismatchError, match="something else .*1e-05 != 1e-06"
    ):
        check_entries(entry, other, names="ab")


@pytest.mark.parametrize("form", FORMS)
def test_the_second_model_stays_as_it_is(form):
    """With its task, and tensors that the first does not have too, wherever that goes."""
    one, other = model_of(form, 0, "abc"), model_of(form, 100, "xyz")
    one.set_task("a")
    other.set_task("z")
    expected, alone = values(other), floats(other.backbone)
    combine(one, other)
    assert same_bits(floats(other.backbone), alone)
    mine, theirs = (
        {id(v) for part in (m.shared, m.modulators) for v in part.parameters()}
        for m in (one, other)
    )
    assert theirs and not mine & theirs
    assert all(same_bits(v, expected[t]) for t, v in values(other).items())


def test_a_model_that_is_refused_keeps_its_task():
    one, other = model_of("dense", 0, "abc"), model_of("dense", 0, "xyz")
    with torch.no_grad():
        other.backbone[1].weight += 1
    one.set_task("c")
    alone = floats(one.backbone)
    with pytest.raises(CheckpointMismatchError, match="one base model"):
        combine(one, other)
    assert same_bits(floats(one.backbone), alone)


def test_manifests_of_groups_are_held_against_their_form(tmp_path):
    from fusion_bench_didi.checkpoint.deltas import write_manifest

    one, other = model_of("dense", 0, "abc"), model_of("dense", 100, "xyz")
    combine(one, other, output_dir=tmp_path / "both")
    config = read_config(tmp_path / "both")
    (label, group), *_ = config["groups"].items()
    for groups in (
        {label: {**group, "tasks": ["x", "q"]}},
        {label: group, "2": group},
        {label: {**group, "tensors": []}},
        {},
        [],
    ):
        changed = {k: v for k, v in config.items() if k != "checksum"}
        write_manifest(tmp_path / "both" / "config.json", {**changed, "groups": groups})
        with pytest.raises(CheckpointMismatchError):
            DiDiModel.from_pretrained(tmp_path / "both", base())
