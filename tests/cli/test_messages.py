"""What is said where something cannot be done names what was typed, and what can be typed instead."""

from pathlib import Path
from types import SimpleNamespace

import click
import huggingface_hub
import pytest
from commands import run
from helpers import BASE
from huggingface_hub.errors import RepositoryNotFoundError
from hydra.core.hydra_config import HydraConfig
from torch import nn

from fusion_bench_didi.checkpoint.directory import check_target
from fusion_bench_didi.editing import add_task
from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.models.pool_saving import check_saving
from fusion_bench_didi.task_vectors.alignment import check_alignment
from fusion_bench_didi.task_vectors.sources import ModuleSource


@pytest.fixture
def hub(monkeypatch) -> list[str]:
    """The names that the hub is asked for; it has none of them."""
    asked: list[str] = []

    def model_info(name: str, **_: object) -> None:
        asked.append(name)
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise RepositoryNotFoundError("404", response=response)

    def download(name: str, **_: object) -> None:
        raise AssertionError(f"{name} is downloaded")

    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=model_info)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def models(place: Path) -> list[Path]:
    return [place / name for name in (BASE, "mnist", "svhn")]


def test_the_way_out_is_that_of_the_program_that_was_called(
    tiny_clip_dir, tmp_path, monkeypatch
):
    with pytest.raises(FileExistsError, match="replace it: --overwrite.$"):
        run("merge", *models(tiny_clip_dir), "-o", tmp_path)
    with pytest.raises(FileExistsError, match="replace it: overwrite=True.$"):
        check_target(tmp_path)
    program = SimpleNamespace(merged_model_save_path=str(tmp_path))
    wanted = r"replace it: \+merged_model_save_kwargs.overwrite=true.$"
    with pytest.raises(FileExistsError, match=wanted):
        check_saving(program)
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    with pytest.raises(FileExistsError, match="replace it: method.overwrite=true.$"):
        check_target(tmp_path)


def test_all_that_is_wrong_is_said_at_once(tiny_clip_dir, tmp_path, hub):
    base, *tuned = models(tiny_clip_dir)
    with pytest.raises(click.UsageError) as told:
        run(
            "merge", base, *tuned, "./gone", "a=x/y/z", "-o", tmp_path, "-s", "bugdet=1"
        )
    message = told.value.format_message()
    for part in (f"{tmp_path} exists", "./gone does not", "x/y/z does not", "bugdet"):
        assert part in message
    assert not hub


def test_a_plan_does_not_mind_what_lies_where_nothing_is_written(
    tiny_clip_dir, tmp_path
):
    told = run("merge", *models(tiny_clip_dir), "-o", tmp_path, "--dry-run")
    assert "never takes more than the budget says" in told


@pytest.mark.parametrize("place", ["./gone", "/gone/model", "a/b/c", "../x"])
@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "{}"),
        ("verify", "{}"),
        ("export", "{}", "out", "--form", "peft"),
        ("rescale", "{}", "--budget", "0.1", "-o", "out"),
    ],
)
def test_no_hub_is_asked_for_what_is_a_path(command, place, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^{place} does not exist"):
        run(*(word.format(place) for word in command))
    assert not hub


def test_the_hub_is_asked_once_for_what_may_be_a_name(tiny_clip_dir, tmp_path, hub):
    base, *_ = models(tiny_clip_dir)
    with pytest.raises(click.BadParameter, match="the hub has no model of that name"):
        run("merge", base, "some/model", "-o", tmp_path / "m")
    assert hub == ["some/model"]


def test_a_model_of_another_architecture_is_called_by_its_task(tiny_clip):
    from helpers import didi

    merged = didi(tiny_clip.pool_models(), budget=0.5)
    with pytest.raises(CheckpointMismatchError, match="^dtd: no tensor is one") as told:
        add_task(merged, nn.Sequential(nn.Linear(2, 2)), "dtd", budget=0.1)
    assert BASE not in str(told.value)


def test_layers_that_are_wrong_alike_are_told_in_one_line():
    def tower(width: int) -> ModuleSource:
        layers = (nn.Linear(width, width) for _ in range(30))
        return ModuleSource(nn.ModuleDict({"layers": nn.ModuleList(layers)}), "x")

    with pytest.raises(CheckpointMismatchError) as told:
        check_alignment(tower(4), {"dtd": tower(6)})
    lines = [line for line in str(told.value).splitlines() if "dtd" in line]
    assert lines == [
        "  dtd: layers.*.bias, 30 tensors: is (6,), the base model has (4,)",
        "  dtd: layers.*.weight, 30 tensors: is (6, 6), the base model has (4, 4)",
    ]


def test_an_option_stands_for_a_setting_where_there_is_one(tiny_clip_dir, tmp_path):
    base, *tuned = models(tiny_clip_dir)
    run("merge", base, *tuned, "-o", tmp_path / "m", "-s", "refine_sweeps=2")
    with pytest.raises(ValueError, match="Give --out, or --overwrite to replace"):
        run("add-task", tmp_path / "m", tiny_clip_dir / "eurosat", "--budget", 0.1)
