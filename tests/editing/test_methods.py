"""Models of other methods are edited too, in whatever form they store their tasks; and what is damaged is refused."""

import copy

import pytest
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, floats, same_bits
from tucker_models import linears

from fusion_bench_didi.checkpoint.deltas import read_config, write_manifest
from fusion_bench_didi.editing import (
    add_task,
    combine,
    load_tasks,
    remove_task,
    rescale,
)
from fusion_bench_didi.editing.settings import merged_with, of_one_task
from fusion_bench_didi.errors import CheckpointMismatchError, SettingsError
from fusion_bench_didi.merging.settings import Budget, MergeSettings
from fusion_bench_didi.method.baselines.bitdelta import BitDelta
from fusion_bench_didi.method.baselines.compeft import ComPEFT
from fusion_bench_didi.method.baselines.dare import DARE
from fusion_bench_didi.method.baselines.delta_come import DeltaCoMe
from fusion_bench_didi.method.baselines.emr import EMRMerging
from fusion_bench_didi.method.baselines.tall_mask import TallMaskMerging
from fusion_bench_didi.method.baselines.tvq import TaskVectorQuantization
from fusion_bench_didi.method.baselines.twin import TwinMerging
from fusion_bench_didi.models.dynamic import DynamicModel

METHODS = (
    BitDelta,
    ComPEFT,
    DARE,
    DeltaCoMe,
    EMRMerging,
    TallMaskMerging,
    TaskVectorQuantization,
    TwinMerging,
)


def values(model, tasks):
    return {task: floats(model.materialize(task)) for task in tasks}


def apart(model, before):
    """Squared distance from earlier values, over their size."""
    lost = whole = 0.0
    for task, old in before.items():
        new = floats(model.materialize(task))["weight"]
        lost += float((new - old["weight"]).square().sum())
        whole += float(old["weight"].square().sum())
    return lost / whole


@pytest.mark.parametrize("method", METHODS)
def test_every_stored_form_is_edited(method, tmp_path):
    models = linears(4, side=32, size=3)
    new = models.pop("3")
    model = method().run(BaseModelPool(models))
    model.save_pretrained(tmp_path / "saved")
    add_task(tmp_path / "saved", new, "3", budget=0.3, backbone=models[BASE], overwrite=True)  # fmt: skip
    saved = DynamicModel.from_pretrained(tmp_path / "saved", models[BASE])
    assert type(saved) is type(model) and saved.tasks == [*"0123"]
    before, storage = values(model, "012"), model.storage
    found = add_task(model, new, "3", budget=0.3)
    assert found.facts["relative_error"] < 0.01
    after = values(model, "012")
    assert all(same_bits(before[task], after[task]) for task in before)
    remove_task(model, "3")
    assert model.storage == storage
    budget = 0.9 * storage.x_excl
    rescale(model, budget=budget)
    assert 0 < model.storage.x_excl <= budget
    # what is drawn at random has no structure that other forms could use
    assert apart(model, before) < 0.5


def test_facts_of_a_directory_are_data(tmp_path):
    model = didi(linears(3, side=16), budget=0.4, factor_dtype="auto")
    model.save_pretrained(tmp_path / "model")
    config = read_config(tmp_path / "model")
    config.pop("checksum")
    for key, value in {
        "edits": [{"done": 1}],
        "parents": ["0"],
        "ranks": {"experts": {"0": 3}},
        "energy_kept": {"weight": [0.5]},
        "relative_error": "much",
        "relative_errors": {"0": -1.0},
        "energies": ["0"],
    }.items():
        info = {**config["info"], key: value}
        write_manifest(tmp_path / "model" / "config.json", {**config, "info": info})
        with pytest.raises(CheckpointMismatchError, match=key):
            remove_task(tmp_path / "model", "0", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_the_merge_come_back():
    models = linears(3, side=16)
    chosen = {"factor_dtype": "int8", "normalization": "matrix", "shared": "mean"}
    model = didi(models, budget=0.9, **chosen)
    found = merged_with(model.info, Budget(0.5))
    assert found.budget == Budget(0.5)
    assert {key: getattr(found, key) for key in chosen} == chosen
    assert merged_with({"settings": {"width": 4}}, Budget(0.5)) == MergeSettings(
        Budget(0.5)
    )
    told = {**model.info["settings"], "learning": {"no such": 1}}
    with pytest.raises(SettingsError, match="merged with cannot be read"):
        merged_with({"settings": told}, Budget(0.5))


def test_a_task_by_itself_is_stored_as_the_others_were():
    given = MergeSettings(Budget(1.0), gain="none", normalization="matrix")
    settings = of_one_task(given, Budget(0.2))
    assert (settings.gain, settings.normalization) == ("none", "matrix")


def total(models, model):
    """Energy that is not reproduced, in parts of all, of the tasks that a model has."""
    base, lost, whole = floats(models[BASE]), 0.0, 0.0
    for task in model.tasks:
        found, tuned = floats(model.materialize(task)), floats(models[task])
        lost += sum(float((found[n] - v).square().sum()) for n, v in tuned.items())
        whole += sum(float((base[n] - v).square().sum()) for n, v in tuned.items())
    return lost / whole


def test_the_error_told_is_that_of_the_tasks_that_there_are(tmp_path):
    """Whatever came and went; of a smaller budget it is a bound."""
    models = linears(5, side=16)
    for name in "34":  # a task of much energy and a bad expert, which weighs most
        models[name].weight.data = 3 * models[name].weight.data
    model = didi({n: models[n] for n in (BASE, *"012")}, budget=0.8, shared="auto")

    def told():
        return pytest.approx(model.info.get("relative_error"), rel=1e-3)

    assert total(models, model) == told()
    other = didi({n: models[n] for n in (BASE, *"34")}, budget=0.2)
    add_task(model, models["3"], "3", budget=0.01)
    assert total(models, model) == told() and total(models, model) > 0.5
    model.save_pretrained(tmp_path / "m")
    for some in ("3", "20"):
        part = load_tasks(tmp_path / "m", [*some], copy.deepcopy(models[BASE]))
        assert total(models, part) == pytest.approx(part.info["relative_error"])
        assert {*part.info["relative_errors"]} == {*some}
    remove_task(model, "1")
    assert total(models, model) == told()
    rescale(model, budget=0.5 * model.storage.x_excl)
    assert total(models, model) <= model.info["relative_error"]
    remove_task(model, "3")
    assert total(models, model) <= model.info["relative_error"]
    combine(model, other)
    assert total(models, model) <= model.info["relative_error"]


@pytest.mark.parametrize("edit", ["add", "remove", "combine", "load"])
def test_no_error_is_told_where_a_tasks_energy_is_not_known(edit, tmp_path):
    """As of models that earlier versions wrote."""
    models = linears(3, side=16)
    model = didi({n: models[n] for n in (BASE, *"01")}, budget=0.4)
    other = didi({BASE: models[BASE], "a": models["0"], "b": models["2"]}, budget=0.4)
    del model.info["energies"]
    if edit == "add":
        add_task(model, models["2"], "2", budget=0.2)
    elif edit == "remove":
        remove_task(model, "1")
    elif edit == "combine":
        combine(model, other)
    else:
        model.save_pretrained(tmp_path / "m")
        model = load_tasks(tmp_path / "m", ["1"], models[BASE])
    assert "relative_error" not in model.info
    assert {*model.info["relative_errors"]} == {*model.tasks}
    assert "of the task vectors' energy" not in repr(model)
