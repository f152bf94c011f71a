"""What is said where something cannot be done names what was typed, and what can be typed instead."""

import shutil
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

from fusion_bench_didi import load
from fusion_bench_didi.checkpoint.directory import check_target
from fusion_bench_didi.demo.folder_pools import open_folder
from fusion_bench_didi.editing import add_task
from fusion_bench_didi.errors import (
    CheckpointMismatchError,
    DiDiError,
    ModelPoolError,
    spelled,
)
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


@pytest.mark.parametrize(
    "method, told",
    [
        ("didi/cat", r"Add modelpool.train_datasets with fusion_bench \(test"),
        ("didi/wemoe", "Give modelpool.test_datasets with fusion_bench.$"),
        (
            "didi/merge",
            "modelpool.val_datasets with fusion_bench, or .* -s objective=p",
        ),
    ],
)
def test_what_a_command_does_not_take_is_of_the_host(
    tiny_clip_dir, tmp_path, method, told
):
    line = ["merge", *models(tiny_clip_dir), "-o", tmp_path / "m", "--method", method]
    with pytest.raises(ModelPoolError, match=told):
        run(*line)


def test_a_base_model_that_moved_is_given_as_the_program_takes_it(
    tiny_clip_dir, tmp_path
):
    shutil.copytree(tiny_clip_dir / BASE, tmp_path / BASE)
    tuned = models(tiny_clip_dir)[1:]
    run("merge", tmp_path / BASE, *tuned, "-o", tmp_path / "m", "--budget", 0.3)
    shutil.rmtree(tmp_path / BASE)
    with pytest.raises(DiDiError, match="Pass --base <the base model of the merge>.$"):
        run("verify", tmp_path / "m")
    with pytest.raises(DiDiError, match="Pass backbone=<the base model of the merge>"):
        load(tmp_path / "m")


@pytest.mark.parametrize("key", ["modelpool.root", "backbone", "path.log_dir"])
def test_what_is_no_setting_of_a_method_is_not_below_it(monkeypatch, key):
    assert spelled(key, "x") == f"{key}=x"
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    assert spelled(key, "x") == f"{key}=x"
    assert spelled("budget", "1") == "method.budget=1"


def test_a_comparison_names_its_options(tmp_path, demo_suite):
    line = ["compare", "-o", tmp_path / "c", "--only", "pretrained", "--no-report"]
    with pytest.raises(FileNotFoundError, match="Give the folder: --suite.$"):
        run(*line, "--suite", tmp_path)
    with pytest.raises(FileNotFoundError, match="modelpool.root and taskpool.root.$"):
        open_folder(tmp_path)
    pools = [f"{p}.{k}={v}" for p in ("modelpool", "taskpool") for k, v in demo_suite.items()]  # fmt: skip
    run(*line, *pools)
    with pytest.raises(DiDiError, match=r"Give another directory \(--out ...\), the"):
        run(*line, *pools, "--seed", 5)
