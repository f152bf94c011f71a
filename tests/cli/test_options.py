"""Options of commands: none is passed over in silence, and what cannot be had is said before anything is read."""

import json

import click
import pytest
import torch
from commands import run
from helpers import BASE

from fusion_bench_didi.errors import DiDiError, SettingsError

POOLS = ("modelpool", "taskpool")


@pytest.fixture(scope="module")
def merge(tiny_clip_dir):
    return ["merge", *(tiny_clip_dir / name for name in (BASE, "mnist", "svhn"))]


@pytest.fixture(scope="module")
def merged(merge, tmp_path_factory):
    place = tmp_path_factory.mktemp("options") / "merged"
    run(*merge, "-o", place)
    return place


def small(suite) -> list[str]:
    """Overrides for a comparison on a small suite."""
    return [f"{pool}.{k}={v}" for pool in POOLS for k, v in suite.items()]


@pytest.mark.parametrize(
    "line, told",
    [
        ("--budget 0.3 -s budget=0.5", "budget=... is what --budget says"),
        ("-s budget=0.3 -s budget=0.5", "budget is given 2 times"),
        ("-s output_dir=elsewhere", "output_dir=... is what --out says"),
        ("-s overwrite=true", "overwrite=... is what --overwrite says"),
        ("--dry-run -s dry_run=false", "dry_run=... is what --dry-run says"),
    ],
)
def test_a_setting_that_is_given_twice_is_refused(merge, tmp_path, line, told):
    with pytest.raises(click.UsageError, match=told):
        run(*merge, "-o", tmp_path / "out", *line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting, told",
    [
        ("own=[a", "'own=\\[a' cannot be read"),
        ("own='a", "cannot be read"),
        ("own={", "cannot be read"),
        ("budget=${foo}", "Interpolation key 'foo' not found"),
        ("budget=${oc.env:NO_SUCH_NAME}", "NO_SUCH_NAME"),
        ("budget=???", "Missing mandatory value: budget"),
        ("own=???", "Missing mandatory value: own"),
        ("task_aliases=a task_aliases.x=b", "task_aliases.x is a part of task_aliases"),
        ("own=[a] own[0]=b", r"own\[0\] is a part of own"),
    ],
)
def test_a_value_that_cannot_be_read_is_told(merge, tmp_path, setting, told):
    given = [word for one in setting.split() for word in ("-s", one)]
    with pytest.raises(click.BadParameter, match=told):
        run(*merge, "-o", tmp_path / "out", *given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line, told",
    [
        ("-s own.0=x", r"own is a list, and has no 0. Give all of it: -s own=\[...\]."),
        ("-s exclude[0]=x", "exclude is a list"),
        ("-s own.x=1", "own is a list, and has no x"),
        ("--method didi/routed -s base_method=[a]", "Give these: -s base_method.KEY="),
        ("--method didi/routed -s base_method=didi/s", "base_method is 'didi/s', exp"),
    ],
)
def test_a_setting_of_another_shape_is_told(merge, tmp_path, line, told):
    with pytest.raises(SettingsError, match=told):
        run(*merge, "-o", tmp_path / "out", *line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting, said_by",
    [
        ("directory=x", "DIRECTORY"),
        ("out=x", "OUT"),
        ("form=plain", "--form"),
        ("tasks=[svhn]", "--task"),
        ("base=x", "--base"),
        ("overwrite=true", "--overwrite"),
    ],
)
def test_an_export_takes_its_options_from_one_place(merged, tmp_path, setting, said_by):
    with pytest.raises(click.UsageError, match=f"is what {said_by} says"):
        run("export", merged, tmp_path / "out", "--form", "peft", "-s", setting)


@pytest.mark.parametrize(
    "override, told",
    [
        ("foo=1", "Could not override 'foo'"),
        ("modelpool=nope", "Could not find 'modelpool/nope'"),
        ("notanoverride", "Error parsing override"),
        ("entries.didi_140.overrides.budgt=1", "overrides.budgt"),
        ("seed=${foo}", "Interpolation key 'foo' not found"),
    ],
)
def test_an_override_that_cannot_be_read_is_told(tmp_path, override, told):
    with pytest.raises(click.BadParameter, match=told):
        run("compare", "-o", tmp_path / "out", "--only", "pretrained", override)
    assert not list(tmp_path.iterdir())


def test_a_check_of_files_alone_takes_no_base(merged):
    with pytest.raises(click.UsageError, match="--files-only does without --base"):
        run("verify", merged, "--files-only", "--base", "elsewhere")


@pytest.mark.parametrize("model", ["_x_", "_x_={}", "_pretrained_={}"])
def test_a_model_is_left_out_by_no_name(merge, tiny_clip_dir, tmp_path, model):
    model = model.format(tiny_clip_dir / "eurosat")
    with pytest.raises(click.BadParameter, match="are no tasks, .* give TASK="):
        run(*merge, model, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "line, told",
    [
        ("path.log_dir=elsewhere", "path.log_dir=... is what --out says"),
        ("--only pretrained only=[individuals]", "only=... is what --only says"),
        ("--skip emr +skip=[wudi]", "skip=... is what --skip says"),
        ("--seed 1 seed=2", "seed=... is what --seed says"),
        ("--no-report report=true", "report=... is what --no-report says"),
        ("--suite s modelpool=didi/demo", "modelpool=... is what --suite says"),
        ("--suite s taskpool.root=t", "taskpool.root=... is what --suite says"),
        ("--tasks a ++taskpool.tasks=[b]", "taskpool.tasks=... is what --tasks says"),
    ],
)
def test_an_override_that_an_option_stands_for_is_refused(tmp_path, line, told):
    with pytest.raises(click.UsageError, match=told.replace(".", r"\.")):
        run("compare", "-o", tmp_path / "out", *line.split())
    assert not list(tmp_path.iterdir())


def test_an_override_counts_where_no_option_says_otherwise(demo_suite, tmp_path):
    place = tmp_path / "of a, b={c} d"  # no grammar reads it
    run("compare", "-o", place, *small(demo_suite), "only=[pretrained]", "report=false", "seed=3")  # fmt: skip
    found = json.loads((place / "comparison.json").read_text())
    assert [row["key"] for row in found["rows"]] == ["pretrained"]
    assert json.loads((place / "settings.json").read_text())["seed"] == 3
    assert not (place / "comparison.html").exists()


def test_a_comparison_searches_where_its_overrides_say(demo_suite, tmp_path):
    """A method of the user's own is a row by its name."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    own = "_target_: fusion_bench_didi.method.EMRMerging\n"
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(own)
    told = run(
        *("compare", "-o", tmp_path / "out", *small(demo_suite), "dry_run=true"),
        *(f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "--only", "mine"),
        "+entries.mine={method: mine, group: dynamic}",
    )
    assert "Nothing is known to fail of mine" in told


@pytest.mark.parametrize("device", ["cuda", "nowhere", "meta", "cuda:99"])
@pytest.mark.parametrize("command", ["merge", "add-task", "rescale", "serve"])
def test_a_device_that_is_not_to_be_had_is_told(
    merge, merged, tiny_clip_dir, tmp_path, command, device
):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is to be had")
    line = {
        "merge": [*merge, "-o", tmp_path / "out"],
        "add-task": ["add-task", merged, tiny_clip_dir / "eurosat", "--budget", "0.1", "-o", tmp_path / "out"],
        "rescale": ["rescale", merged, "--budget", "0.1", "-o", tmp_path / "out"],
        "serve": ["serve", merged, "--port", "0"],
    }  # fmt: skip
    with pytest.raises(click.UsageError, match="not to be had here|is not one of"):
        run(*line[command], "--device", device)


@pytest.mark.parametrize("name", ["randes", "didi/RanDeS", "didi/nothing", "nowhere/x"])
def test_a_method_that_there_is_not_is_told_with_those_that_there_are(
    merge, tmp_path, name
):
    with pytest.raises(click.UsageError, match=f"There is no method {name}. .*didi/"):
        run(*merge, "-o", tmp_path / "out", "--method", name)


@pytest.mark.parametrize(
    "name, meant",
    [("emr", "didi/emr"), ("TSV-C", "didi/tsv_c"), ("didi/randez", "didi/randes")],
)
def test_a_method_may_be_meant_by_the_last_part_of_its_name(
    merge, tmp_path, name, meant
):
    for line in (["settings", name], [*merge, "-o", tmp_path / "o", "--method", name]):
        with pytest.raises(click.UsageError, match=f"Did you mean {meant}?"):
            run(*line)
    with pytest.raises(click.UsageError, match="Did you mean task_arithmetic?"):
        run(*merge, "-o", tmp_path / "o", "--method", "task_aritmetic")


@pytest.mark.parametrize(
    "name, told",
    [("CLIPVisionModell", "Did you mean CLIPVisionModel?"), ("Xyz0", "Leave it out")],
)
def test_a_class_that_there_is_not_is_told(merge, tmp_path, name, told):
    with pytest.raises(click.BadParameter, match=f"no class {name}. {told}"):
        run(*merge, "-o", tmp_path / "o", "--model-class", name)


@pytest.mark.parametrize("form", ["peft", "plain"])
def test_a_setting_that_adapters_do_not_have_is_told(merged, tmp_path, form):
    line = ["export", merged, tmp_path / "out", "--form", form]
    with pytest.raises(DiDiError, match="no setting rank. Did you mean .*rank?"):
        run(*line, "-s", "rank=3")


def test_a_library_that_there_is_not_is_not_empty(tmp_path):
    for more in ([], ["--remove", "svhn"]):
        with pytest.raises(click.UsageError, match="There is no library"):
            run("library", tmp_path / "typo", *more)


def test_tasks_that_a_suite_has_not_are_told(demo_suite, tmp_path):
    few = ("--only", "pretrained")
    with pytest.raises(DiDiError, match="has no nosuch"):
        run("compare", "-o", tmp_path, *small(demo_suite), *few, "--tasks", "nosuch")


def test_a_comparison_that_lacks_a_row_is_an_error_that_names_it(demo_suite, tmp_path):
    line = ["compare", "-o", tmp_path, *small(demo_suite), "--no-report"]
    entry = "+entries.bad={method: didi/free, group: dynamic, overrides: {patterns: [nothing*]}}"
    with pytest.raises(DiDiError, match="1 of 2 methods failed: bad .Model"):
        run(*line, entry, "--only", "bad,pretrained")
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [row["average"] is None for row in rows] == [False, True]
    with pytest.raises(DiDiError, match="leave no method"):
        run(*line, "--only", "pretrained", "--skip", "pretrained")
