"""A place below ``~`` is one in the home directory, whoever is given it: shells leave it in ``TASK=~/model``, and Python does."""

import shutil
from pathlib import Path

import pytest
from commands import run
from helpers import BASE, didi
from report.test_report import synthetic

import fusion_bench_didi
from fusion_bench_didi import editing
from fusion_bench_didi.artifacts import save_artifact
from fusion_bench_didi.checkpoint.deltas import read_config
from fusion_bench_didi.checkpoint.directory import write_json
from fusion_bench_didi.export import export
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.report import plots, write_report

OUT = "~/out"
FUNCTIONS = {
    "load": lambda: fusion_bench_didi.load("~/m", "~/_pretrained_"),
    "from_pretrained": lambda: DiDiModel.from_pretrained("~/m", "~/_pretrained_"),
    "save_pretrained": lambda: fusion_bench_didi.load("~/m").save_pretrained(OUT),
    "save_artifact": lambda: save_artifact(
        fusion_bench_didi.load("~/m"), OUT, base=None, types={}
    ),
    "read_config": lambda: read_config("~/m"),
    "export": lambda: export("~/m", OUT, form="plain", base="~/_pretrained_"),
    "add_task": lambda: editing.add_task(
        "~/m", "~/eurosat", "eurosat", budget=0.2, output_dir=OUT
    ),
    "add_task, a path": lambda: editing.add_task(
        Path("~/m"), Path("~/ad/svhn"), "x", budget=0.2, output_dir=Path(OUT)
    ),
    "remove_task": lambda: editing.remove_task("~/m", "svhn", output_dir=OUT),
    "rescale": lambda: editing.rescale("~/m", budget=0.3, output_dir=OUT),
    "combine": lambda: editing.combine("~/m", "~/other", output_dir=OUT),
    "load_tasks": lambda: editing.load_tasks("~/m", ["svhn"], "~/_pretrained_"),
    "library": lambda: editing.AdapterLibrary(OUT).add("~/m"),
    "report": lambda: write_report("~/report"),
}
LINES = [
    "merge ~/_pretrained_ mnist=~/mnist ~/svhn -o ~/out",
    "merge ~/_pretrained_ mnist=~/ad/mnist svhn=~/ad/svhn -o ~/out --method didi/emr",
    "merge ~/_pretrained_ a=~/mnist b=~/svhn -o ~/out --method simple_average",
    "inspect ~/m",
    "verify ~/m --base ~/_pretrained_",
    "add-task ~/m ~/eurosat --budget 0.2 -o ~/out --base ~/_pretrained_",
    "remove-task ~/m svhn -o ~/out",
    "rescale ~/m --budget 0.3 -o ~/out",
    "combine ~/m ~/other -o ~/out",
    "library ~/out --add ~/m",
    "export ~/m ~/out --form patch --base ~/_pretrained_",
    "report ~/report",
    "report ~/report ~/report -o ~/out",
]


@pytest.fixture(scope="module")
def filled(tiny_clip_dir, tmp_path_factory):
    """A home directory with models, merged ones, adapters and a comparison."""
    home = tmp_path_factory.mktemp("homes") / "home"
    shutil.copytree(tiny_clip_dir, home)
    places = [home / name for name in (BASE, "mnist", "svhn")]
    run("merge", *places, "-o", home / "m", "--budget", 0.6)
    run("merge", home / BASE, f"a={places[1]}", f"b={places[2]}", "-o", home / "other")
    run("export", home / "m", home / "ad", "--form", "peft")
    (home / "report").mkdir()
    write_json(home / "report" / "comparison.json", synthetic())
    return home


@pytest.fixture
def home(filled, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(filled))
    monkeypatch.setattr(plots, "write", lambda *_: [])  # slow
    yield filled
    shutil.rmtree(filled / "out", ignore_errors=True)
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_knows_the_home_directory(home, name):
    found = FUNCTIONS[name]()
    directory = getattr(found, "directory", None)
    assert directory is None or Path(directory) == home / "out"


@pytest.mark.parametrize("line", LINES)
def test_a_command_knows_the_home_directory(home, line):
    run(*line.split())
    assert ("~/out" in line) == (home / "out").is_dir()
