"""A model on one screen, live and from its directory."""

import math

import pytest
from helpers import didi

from fusion_bench_didi.checkpoint.deltas import read_config
from fusion_bench_didi.editing import add_task, remove_task, rescale
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.models.overview import facts_of, overview


@pytest.fixture
def merged(tiny_clip):
    return didi(tiny_clip.pool_models(), budget=0.6, factor_dtype="auto")


def test_a_model_is_told_on_one_screen(merged):
    lines = repr(merged).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert lines[0] == (
        "DiDiModel by DiDi-Merging: 3 tasks on CLIPVisionModel from memory"
    )
    told = dict(line.split(maxsplit=1) for line in lines if line)
    assert told["budget"] == "0.6 beyond the backbone"
    assert told["storage"].startswith(f"{merged.storage.x_excl:.2f}x of one")
    assert {"parts", "numbers", "forms", "ranks", "error"} <= told.keys()
    for task in merged.tasks:
        assert told[task].endswith("a model in memory")


def test_a_directory_is_told_as_its_model(merged, tmp_path):
    merged.attach_router("subspace")
    merged.save_pretrained(tmp_path / "m")
    saved = overview(read_config(tmp_path / "m")).splitlines()
    live = repr(merged).splitlines()
    assert [line for line in saved if not line.startswith("written")] == live
    assert any(line == "router   projection" for line in live)


def test_errors_per_task_are_parts_of_each_tasks_energy(merged):
    errors = merged.info["relative_errors"]
    assert set(errors) == set(merged.tasks)
    low, high = min(errors.values()), max(errors.values())
    assert low <= merged.info["relative_error"] <= high


def test_tensors_that_are_left_out_count_in_no_error(tiny_clip):
    model = didi(tiny_clip.pool_models(), budget=0.5, exclude=["*layers.0*"])
    (line,) = [line for line in repr(model).splitlines() if line.startswith("error")]
    assert line.endswith("is not reproduced, excluded tensors not counted")


def test_many_tasks_still_fit(make_tiny_clip):
    tasks = tuple(f"task-{i}" for i in range(20))
    model = didi(make_tiny_clip(tasks).pool_models(), budget=2, shared="none")
    lines = repr(model).splitlines()
    assert len(lines) <= 24 and lines[-1] == "… and 8 more"


def test_notebooks_get_a_table_without_markup_of_names(merged):
    merged.info["parents"] = {task: "<script>" for task in merged.tasks}
    page = merged._repr_html_()
    assert page.count("<tr>") >= 6 and "<script>" not in page


def test_a_budget_is_told_with_the_edits_since(tiny_clip):
    models = tiny_clip.pool_models()
    model = didi({n: models[n] for n in list(models)[:3]}, budget=1.2)
    assert "edited" not in facts_of(model.described())
    add_task(model, models["eurosat"], "eurosat", budget=0.2)
    remove_task(model, "svhn")
    told = facts_of(model.described())
    assert told["budget"] == "1.2 beyond the backbone, before it was edited"
    assert told["edited"] == "add eurosat, remove svhn"
    rescale(model, budget=0.3)
    told = facts_of(model.described())
    assert told["budget"] == "0.3 beyond the backbone"
    assert told["edited"] == "add eurosat, remove svhn, rescale"


def test_no_budget_at_all_is_told_of_directories_too(tiny_clip, tmp_path):
    models = tiny_clip.pool_models()
    model = didi({n: models[n] for n in list(models)[:3]}, budget=math.inf)
    model.save_pretrained(tmp_path / "m")
    loaded = DiDiModel.from_pretrained(tmp_path / "m", tiny_clip.base)
    add_task(loaded, models["eurosat"], "eurosat", budget=math.inf)
    for told in (overview(read_config(tmp_path / "m")), repr(loaded)):
        assert "budget   inf beyond the backbone" in told
