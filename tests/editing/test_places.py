"""Laws of where edits are written: of edits of one directory at the same time none is lost without a word."""

import copy

import pytest
from helpers import BASE, didi
from saved_directories import listing
from tucker_models import linears

from fusion_bench_didi.checkpoint import deltas
from fusion_bench_didi.checkpoint.directory import check_target
from fusion_bench_didi.editing import add_task, combine, remove_task, rescale
from fusion_bench_didi.editing.stored import Stored
from fusion_bench_didi.errors import BudgetError, DiDiError
from fusion_bench_didi.models import DiDiModel


@pytest.fixture
def saved(tmp_path):
    """Models of one base: ``m`` of three tasks, ``other`` of two, and ``link`` to the first."""
    models = linears(6, side=32)
    for name, tasks in (("m", "012"), ("other", "34")):
        some = {task: models[task] for task in (BASE, *tasks)}
        didi(some, budget=1.0).save_pretrained(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    return tmp_path, models


def live(place, models) -> DiDiModel:
    return DiDiModel.from_pretrained(place, copy.deepcopy(models[BASE]))


EDITS = {
    "add": lambda place, models: add_task(
        place / "m",
        models["5"],
        "5",
        budget=0.3,
        backbone=copy.deepcopy(models[BASE]),
        overwrite=True,
    ),
    "remove": lambda place, _: remove_task(place / "m", "0", overwrite=True),
    "remove, by a link": lambda place, _: remove_task(
        place / "m", "0", output_dir=place / "link", overwrite=True
    ),
    "rescale": lambda place, _: rescale(place / "m", budget=0.4, overwrite=True),
    "combine": lambda place, _: combine(place / "m", place / "other", overwrite=True),
    "combine, into the second": lambda place, _: combine(
        place / "other", place / "m", output_dir=place / "m", overwrite=True
    ),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("when", ["read", "worked"])
def test_nobody_else_writes_while_a_directory_is_edited(edit, when, saved, monkeypatch):
    place, models = saved
    whole = live(place / "m", models)
    rivals = {
        "edit": lambda: remove_task(place / "m", "1", overwrite=True),
        "edit in memory": lambda: remove_task(
            copy.deepcopy(whole), "1", output_dir=place / "m", overwrite=True
        ),
        "merge, or save": lambda: whole.save_pretrained(place / "m", overwrite=True),
    }
    refused = []

    def rival(*_):
        monkeypatch.undo()
        for name, write in rivals.items():
            with pytest.raises(DiDiError, match="Another run is writing to .*m. Wait"):
                write()
            refused.append(name)

    owner, name = (deltas, "read_object") if when == "read" else (Stored, "edited")
    found = getattr(owner, name)

    def interrupted(*given, **named):
        rival()
        return found(*given, **named)

    monkeypatch.setattr(owner, name, interrupted)
    tasks = list(edit(place, models).after.expert_bits)
    assert refused == [*rivals]
    assert live(place / "m", models).tasks == tasks
    assert listing(place) == ["link", "m", "other"]
    check_target(place / "m", overwrite=True)  # nobody holds it any more


def test_an_edit_that_fails_leaves_the_directory_to_others(saved):
    place, _ = saved
    with pytest.raises(BudgetError):
        rescale(place / "m", budget=5.0, overwrite=True)
    with pytest.raises(BudgetError):
        rescale(place / "m", budget=5.0, output_dir=place / "new" / "one")
    assert listing(place) == ["link", "m", "other"]
    assert "0" not in remove_task(place / "m", "0", overwrite=True).after.expert_bits


def test_models_in_memory_hold_what_they_replace(saved, monkeypatch):
    place, models = saved
    model, found = live(place / "m", models), Stored.edited

    def interrupted(*given, **named):
        monkeypatch.undo()
        with pytest.raises(DiDiError, match="Another run is writing"):
            rescale(place / "m", budget=0.4, overwrite=True)
        return found(*given, **named)

    monkeypatch.setattr(Stored, "edited", interrupted)
    remove_task(model, "0", output_dir=place / "m", overwrite=True)
    assert live(place / "m", models).tasks == ["1", "2"]
