"""``didi merge``: what it takes models for, and what it refuses before it reads them."""

import json
from pathlib import Path

import click
import pytest
import rich
import torch
from commands import run
from helpers import BASE
from safetensors.torch import load_file
from transformers import CLIPVisionModel

import fusion_bench_didi
from fusion_bench_didi.cli import didi, options
from fusion_bench_didi.errors import CheckpointMismatchError, ModelPoolError

TASKS = ("mnist", "svhn")


def places(models: Path) -> list[Path]:
    return [models / name for name in (BASE, *TASKS)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["didi", "simple_average"])
def test_models_keep_the_type_of_their_checkpoints(
    tiny_clip_dir, tmp_path, dtype, method
):
    for place in places(tiny_clip_dir):
        model = CLIPVisionModel.from_pretrained(place)
        model.to(dtype).save_pretrained(tmp_path / place.name)
    out = tmp_path / "out"
    run("merge", *places(tmp_path), "-o", out, "--method", method)
    if method == "didi":
        loaded = fusion_bench_didi.load(out)
        assert {p.dtype for p in loaded.backbone.parameters()} == {dtype}
        run("export", out, tmp_path / "plain", "--form", "plain", "--task", "svhn")
        out = tmp_path / "plain" / "svhn"
    found = load_file(out / "model.safetensors").values()
    assert {v.dtype for v in found if v.is_floating_point()} == {dtype}


@pytest.mark.parametrize("method", ["task_arithmetic", "didi/se_merging"])
def test_what_the_hosts_methods_print_is_left_out(
    tiny_clip_dir, tmp_path, capfd, method
):
    line = ["merge", *places(tiny_clip_dir), "--method", method, "-o"]
    told = run(*line, tmp_path / "m") + "".join(capfd.readouterr())
    assert "Profiler" not in told and "load model" not in told
    assert "merged in" in told
    assert "Profiler Report" in run("-v", *line, tmp_path / "loud")


def test_bars_are_shown_while_the_host_is_unheard(capsys):
    with didi.make_context("didi", ["merge"]):
        with options.host_unheard():
            print("the host's")
            rich.get_console().print("a bar's")
        print("afterwards")
    assert capsys.readouterr().out.split("\n") == ["a bar's", "afterwards", ""]


@pytest.mark.parametrize("first", ["didi/emr", "simple_average"])
@pytest.mark.parametrize("then", ["didi/emr", "simple_average"])
def test_what_a_merge_wrote_can_be_replaced(tiny_clip_dir, tmp_path, first, then):
    line = ["merge", *places(tiny_clip_dir), "-o", tmp_path / "m", "--method"]
    run(*line, first)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="replace it: --overwrite"):
        run(*line, then)
    run(*line, then, "--overwrite")
    run("merge", *places(tiny_clip_dir), "-o", tmp_path / "fresh", "--method", then)
    names = {p.name for p in (tmp_path / "fresh").iterdir()}
    assert {p.name for p in (tmp_path / "m").iterdir()} == {*names, "notes.txt"}
    (tmp_path / "m" / "base.safetensors").write_bytes(b"mine")
    for given in ([], ["--overwrite"]):
        with pytest.raises(FileExistsError, match="also holds base.safetensors"):
            run(*line, then, *given)


@pytest.mark.parametrize("given", [[], ["--overwrite"]])
def test_what_no_merge_wrote_is_not_to_be_replaced(tiny_clip_dir, tmp_path, given):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwritten. Choose another directory"):
        run("merge", *places(tiny_clip_dir), "-o", tmp_path, *given)


#: what a configuration becomes, of which no model is made
BROKEN = {
    "a list": lambda config: [config],
    "nothing": lambda config: None,
    "deeper than is read": lambda config: '{"a":' * 100_000,
    "deep": lambda config: {**config, "x": deep(480)},
    "a word for settings": lambda config: {**config, "vision_config": "1e400"},
    "another kind of architectures": lambda config: {
        **config,
        "architectures": {"a": 1},
    },
    "a kind that is none": lambda config: {**config, "model_type": []},
}


def deep(levels: int) -> object:
    found: object = 1
    for _ in range(levels):
        found = {"a": found}
    return found


@pytest.mark.parametrize("who", [BASE, "svhn"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_configuration_of_no_model_is_named(tmp_path, what, who):
    config = {"model_type": "clip", "architectures": ["CLIPModel"]}
    for name in (BASE, *TASKS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    file = tmp_path / who / "config.json"
    found = BROKEN[what](config)
    file.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(
        CheckpointMismatchError, match=rf"{who}/config.json is not"
    ) as e:
        run("merge", *places(tmp_path), "-o", tmp_path / "out")
    assert str(e.value).count("config.json") == 1


@pytest.mark.parametrize("who", [BASE, "svhn"])
@pytest.mark.parametrize("given", [[], ["--model-class", "CLIPVisionModel"]])
def test_a_merged_model_is_no_model_to_merge(tiny_clip_dir, tmp_path, who, given):
    run("merge", *places(tiny_clip_dir), "-o", tmp_path / "m", "--budget", 0.3)
    line = {name: tiny_clip_dir / name for name in (BASE, *TASKS)} | {
        who: tmp_path / "m"
    }
    models = [line[BASE], *(f"{task}={line[task]}" for task in TASKS)]
    with pytest.raises(ModelPoolError, match="m is a merged model .*didi export") as e:
        run("merge", *models, "-o", tmp_path / "again", *given)
    assert str(e.value).count("is a merged model") == 1
    with pytest.raises(ModelPoolError, match="m is a merged model .*materialize"):
        fusion_bench_didi.load(tmp_path / "m", tmp_path / "m")


def test_a_place_without_a_model_is_named_once(tiny_clip_dir, tmp_path):
    line = ["merge", tiny_clip_dir / BASE, f"a={tmp_path}", f"b={tmp_path}"]
    with pytest.raises(click.BadParameter, match="is no model") as e:
        run(*line, "-o", tmp_path / "out")
    assert str(e.value).count("is no model") == 1
