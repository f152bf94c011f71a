"""The command ``didi``: what it writes is what Python and YAML write, and what it cannot do it says in a line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from commands import run
from fusion_bench.modelpool import BaseModelPool, CLIPVisionModelPool
from fuzz_cases import CASES
from helpers import BASE, floats, same_bits
from lora_families import ATTENTION, family, llama
from safetensors.torch import load_file, save_file
from snippets import fault

import fusion_bench_didi
from fusion_bench_didi.cli import didi, main
from fusion_bench_didi.cli.reading import finite
from fusion_bench_didi.errors import (
    CheckpointMismatchError,
    DiDiError,
    NonFiniteError,
    SettingsError,
    UnknownTaskError,
)
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.programs.entries import ComparisonError

QUICK = ("-s", "refine_sweeps=2")


def merge(models: Path, out: Path, *arguments: object, tasks=("mnist", "svhn")) -> str:
    places = [models / task for task in tasks]
    return run("merge", models / BASE, *places, "-o", out, *QUICK, *arguments)


@pytest.fixture(scope="module")
def merged(tiny_clip_dir, tmp_path_factory) -> Path:
    """Two tasks."""
    out = tmp_path_factory.mktemp("cli") / "merged"
    assert "written to" in merge(tiny_clip_dir, out, "--budget", 0.6)
    return out


def same_tasks(left, right, tasks) -> bool:
    pairs = [[floats(m.materialize(task)) for m in (left, right)] for task in tasks]
    return all(same_bits(*pair) for pair in pairs)


def test_a_merge_is_that_of_the_method(merged, tiny_clip_dir):
    names = (BASE, "mnist", "svhn")
    pool = CLIPVisionModelPool({n: str(tiny_clip_dir / n) for n in names})
    model = DiDiMerging(budget=0.6, refine_sweeps=2).run(pool)
    loaded = fusion_bench_didi.load(merged)
    assert same_tasks(loaded, model, ("mnist", "svhn"))
    told = loaded.info["parents"]
    assert told["svhn"] == str(tiny_clip_dir / "svhn")


def test_a_directory_is_shown_and_checked(merged, tiny_clip_dir):
    lines = run("inspect", merged).splitlines()
    assert "2 tasks on CLIPVisionModel" in lines[0] and len(lines) < 24
    live = repr(fusion_bench_didi.load(merged)).splitlines()
    assert [line for line in lines if not line.startswith("written")] == live
    assert "tasks: 2, every weight finite\n" in run("verify", merged)
    assert "base model" not in run("verify", merged, "--files-only")
    assert run("verify", merged, "--base", tiny_clip_dir / BASE)


KINDS = ("model", "router", "modules", "individuals", "static", "smile", "wemoe")


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_a_damaged_directory_is_told(kind, tmp_path):
    """Whatever it holds."""
    place = tmp_path / "saved"
    CASES[kind].write(place)
    files = list(place.rglob("*.safetensors"))
    assert files and "as they were written" in run("verify", place, "--files-only")
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointMismatchError, match=re.escape(str(file))):
            run("verify", place, "--files-only")
        file.write_bytes(content)


@pytest.mark.parametrize("alone", [True, False])
def test_weights_that_are_no_numbers_are_told(alone):
    """Of models that have no experts too: static merges, individuals, and buffers of both."""
    model = torch.nn.BatchNorm1d(3)
    told = model if alone else {"mnist": torch.nn.Linear(2, 2), "svhn": model}
    assert finite(told) == (1 if alone else 2)
    model.running_var[1] = torch.inf
    with pytest.raises(NonFiniteError, match="running_var holds NaN or infinity"):
        finite(told)


def test_a_base_model_that_is_no_number_where_nothing_was_merged_is_told(
    tiny_clip_dir, tmp_path
):
    base = shutil.copytree(tiny_clip_dir / BASE, tmp_path / BASE)
    tensors, end = load_file(base / "model.safetensors"), "post_layernorm.weight"
    (name,) = (n for n in tensors if n.endswith(end))
    tensors[name][1] = torch.inf
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    tuned = [tiny_clip_dir / task for task in ("mnist", "svhn")]
    exclude = ("-s", f"exclude=['*{end}']")
    run("merge", base, *tuned, "-o", tmp_path / "m", *QUICK, "--budget", 0.5, *exclude)
    told = run("verify", tmp_path / "m")
    said = rf"every weight finite but for the base model's \S*{end}, left"
    assert re.search(said, told)


def test_models_are_edited_and_exported(merged, tiny_clip_dir, tmp_path):
    new = tiny_clip_dir / "eurosat"
    told = run("add-task", merged, new, "--budget", 0.3, "-o", tmp_path / "three")
    assert told.startswith("before  0.60x") and "keeping all 3 models" in told
    before = fusion_bench_didi.load(merged)
    three = fusion_bench_didi.load(tmp_path / "three")
    assert three.tasks == ["mnist", "svhn", "eurosat"]
    assert same_tasks(three, before, ("mnist", "svhn"))
    run("remove-task", tmp_path / "three", "svhn", "--overwrite")
    run("rescale", merged, "--budget", 0.4, "-o", tmp_path / "small")
    assert fusion_bench_didi.load(tmp_path / "small").storage.x_excl <= 0.4
    run("export", merged, tmp_path / "plain", "--form", "plain", "--task", "svhn")
    assert (tmp_path / "plain" / "svhn" / "model.safetensors").is_file()
    assert "svhn" in run("library", tmp_path / "tasks", "--add", merged)
    left = run("library", tmp_path / "tasks", "--remove", "svhn").split()
    assert left[-1] == "mnist" and len(left) == 3
    with pytest.raises(UnknownTaskError):
        run("remove-task", merged, "dtd", "-o", tmp_path / "none")


def test_two_merged_models_become_one(merged, tiny_clip_dir, tmp_path):
    base, new = tiny_clip_dir / BASE, tiny_clip_dir / "eurosat"
    pair = (f"other={tiny_clip_dir / 'mnist'}", new)
    run("merge", base, *pair, "-o", tmp_path / "b", *QUICK, "--budget", 0.5)
    run("combine", merged, tmp_path / "b", "-o", tmp_path / "all")
    tasks = fusion_bench_didi.load(tmp_path / "all").tasks
    assert tasks == ["mnist", "svhn", "other", "eurosat"]


def test_other_methods_merge_too(tiny_clip_dir, tmp_path):
    places = [tiny_clip_dir / name for name in (BASE, "mnist", "svhn")]
    run("merge", *places, "-o", tmp_path / "emr", "--method", "didi/emr")
    assert "EMR" in run("inspect", tmp_path / "emr").splitlines()[0]
    run("merge", *places, "-o", tmp_path / "mean", "--method", "simple_average")
    assert (tmp_path / "mean" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["simple_average", "ties_merging"])
def test_methods_of_the_host_merge_whole_models_of_adapters(method, tmp_path):
    """And not the factors: a mean of products is no product of means."""
    from fusion_bench.method import SimpleAverageAlgorithm, TiesMergingAlgorithm

    models = family(tmp_path, llama, target_modules=ATTENTION)
    run("merge", *(tmp_path / name for name in models), "-o", tmp_path / "m", "--method", method)  # fmt: skip
    found = floats(type(models[BASE]).from_pretrained(tmp_path / "m"))
    same = {
        "simple_average": SimpleAverageAlgorithm,
        "ties_merging": lambda: TiesMergingAlgorithm(
            scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum"
        ),
    }[method]()
    expected = floats(same.run(BaseModelPool(models)))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        torch.testing.assert_close(found[tensor], value, msg=tensor)


def test_settings_of_a_part_leave_the_others_of_it(tiny_clip_dir, tmp_path):
    places = [tiny_clip_dir / name for name in (BASE, "mnist", "svhn")]
    line = ["merge", *places, "-o", tmp_path / "m", "--method", "didi/routed"]
    part = ["-s", "base_method.budget=0.5", "-s", "base_method.refine_sweeps=2"]
    run(*line, *part)
    model = fusion_bench_didi.load(tmp_path / "m")
    assert 0.45 < model.storage.x_excl <= 0.5 and model.router is not None
    for key in ("base_method.bugdet", "base_methd.budget"):
        with pytest.raises(SettingsError, match="no setting .* Did you mean b"):
            run(*line, "-s", f"{key}=0.5", "--overwrite")
    with pytest.raises(SettingsError, match="^didi/routed: base_method has no setting"):
        run(*line, "-s", "base_method.bugdet=0.5", "--overwrite")


def test_a_plan_writes_nothing(tiny_clip_dir, tmp_path, capfd):
    merge(tiny_clip_dir, tmp_path / "m", "--dry-run")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "start, more",
    [
        ([], ["--devices", "2"]),
        (["-m", "torch.distributed.run", "--nproc-per-node", "2"], []),
    ],
    ids=["its own processes", "torchrun"],
)
def test_processes_write_what_one_writes(merged, tiny_clip_dir, tmp_path, start, more):
    places = [tiny_clip_dir / name for name in (BASE, "mnist", "svhn")]
    program = ["-m", "fusion_bench_didi", "merge"]
    line = [sys.executable, *start, *program, *places, "-o", tmp_path / "two"]
    line += ["--device", "cpu", "--budget", "0.6", *QUICK, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, line)), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("merged in") == 1
    assert "distributed" not in done.stdout + done.stderr
    written, alone = (d / "model.safetensors" for d in (tmp_path / "two", merged))
    assert written.read_bytes() == alone.read_bytes()


def test_processes_that_would_do_the_same_are_refused(
    tiny_clip_dir, tmp_path, monkeypatch
):
    places = [tiny_clip_dir / name for name in (BASE, "mnist")]
    average = ("--method", "simple_average", "--devices", 2)
    with pytest.raises(click.UsageError, match="simple_average merges in one process"):
        run("merge", *places, "-o", tmp_path / "m", *average)
    started = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(click.BadParameter, match="torchrun started 2 processes here"):
        merge(tiny_clip_dir, tmp_path / "m", "--devices", 3)
    assert not (tmp_path / "m").exists()


def test_faults_are_found_before_anything_is_read(merged, tiny_clip_dir, tmp_path):
    with pytest.raises(SettingsError, match="no setting bugdet. Did you mean budget"):
        merge(tiny_clip_dir, tmp_path / "m", "-s", "bugdet=0.5")
    with pytest.raises(
        SettingsError, match="simple_average has no setting .*There are none."
    ):
        merge(
            tiny_clip_dir, tmp_path / "m", "--method", "simple_average", "--budget", 1
        )
    with pytest.raises(SettingsError, match="another type or range"):
        merge(tiny_clip_dir, tmp_path / "m", "-s", "ties_keep=2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        click.BadParameter, match="empty is no model: it holds no config"
    ):
        merge(tiny_clip_dir, tmp_path / "m", tasks=("mnist", tmp_path / "empty"))
    with pytest.raises(click.BadParameter, match="two models are called 'mnist'"):
        merge(tiny_clip_dir, tmp_path / "m", tasks=("mnist", "mnist"))
    with pytest.raises(click.BadParameter, match="no KEY=VALUE"):
        merge(tiny_clip_dir, tmp_path / "m", "-s", "budget")
    with pytest.raises(click.UsageError, match="Did you mean didi/tsv_c"):
        run("settings", "didi/tsvc")


def test_a_comparison_is_that_of_its_configuration(tmp_path):
    with pytest.raises(ComparisonError, match="no entry 'nothing'. There are .*emr"):
        run("compare", "-o", tmp_path / "c", "--only", "nothing", "--suite", tmp_path)
    with pytest.raises(DiDiError, match="is no comparison .No such file or dir"):
        run("report", tmp_path)


def test_settings_are_explained():
    assert "didi/routed" in run("settings").split()
    told = run("settings", "didi")
    assert "budget: 1.4" in told and "# values stored beyond the backbone" in told


@pytest.mark.parametrize("name", didi.commands)
def test_every_command_explains_itself_by_example(name):
    told = run(name, "--help")
    examples = re.findall(rf"^ +(didi {name}.*)$", told, re.MULTILINE)
    assert "Example" in told and examples
    assert not list(filter(None, map(fault, examples)))
    command = didi.commands[name]
    described = [p for p in command.params if isinstance(p, click.Option)]
    assert all(option.help for option in described)


def test_an_error_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["didi", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit, match="^Error: .*config.json does not exist"):
        main()


def test_a_command_alone_tells_its_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["didi", "inspect"])
    if hasattr(click.exceptions, "NoArgsIsHelpError"):  # from click 8.2 on
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, 2)
    else:
        main()
    told = capsys.readouterr()
    assert "didi inspect [OPTIONS] DIRECTORY" in told.out + told.err
