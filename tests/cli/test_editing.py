"""Commands that edit do what the functions do, and say what is wrong in one line."""

import pytest
from commands import run, run_whole
from fusion_bench.modelpool import CLIPVisionModelPool
from helpers import BASE, didi
from tiny_clip import build_tiny_clip

from fusion_bench_didi.editing import AdapterLibrary
from fusion_bench_didi.models import DiDiModel


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Directories of models, and of a merge of two of them."""
    home = tmp_path_factory.mktemp("models")
    build_tiny_clip().save(home)
    names = ("_pretrained_", "mnist", "svhn")
    pool = CLIPVisionModelPool({name: str(home / name) for name in names})
    didi(pool, budget=0.3, factor_dtype="auto").save_pretrained(home / "merged")
    return home


def test_a_session_of_edits(merged, tmp_path):
    one, three, two = (str(tmp_path / name) for name in ("one", "three", "two"))
    small, both = str(tmp_path / "small"), str(tmp_path / "both")
    add = ["add-task", merged / "merged", merged / "eurosat", "--name", "eurosat"]
    said = run(*add, "--budget", "0.15", "--out", three, "--base", merged / BASE)
    assert DiDiModel.from_pretrained(three).tasks == ["mnist", "svhn", "eurosat"]
    assert "3 tasks: mnist, svhn, eurosat" in said and "is lost" in said
    run("remove-task", three, "eurosat", "--out", two)
    run("remove-task", three, "svhn", "--overwrite")
    run("remove-task", three, "mnist", "--out", one)
    assert DiDiModel.from_pretrained(three).tasks == ["mnist", "eurosat"]
    run("combine", two, one, "--out", both)
    assert DiDiModel.from_pretrained(both).tasks == ["mnist", "svhn", "eurosat"]
    run("rescale", both, "--budget", "0.2", "--out", small)
    assert 0.15 < DiDiModel.from_pretrained(small).storage.x_excl <= 0.2
    library = str(tmp_path / "library")
    run("library", library, "--add", both, "--task", "svhn", "--task", "eurosat")
    assert "svhn" not in run("library", library, "--remove", "svhn")
    assert AdapterLibrary(library).load("eurosat").tasks == ["eurosat"]


def test_what_is_wrong_is_said_in_one_line(merged, tmp_path, monkeypatch, capsys):
    model, out = str(merged / "merged"), str(tmp_path / "out")
    for line, text in (
        (["remove-task", model, "mnist"], "written nowhere"),
        (["remove-task", model, "none", "--out", out], "holds no task .'none'."),
        (["rescale", model, "--budget", "7", "--out", out], "no smaller"),
        (["combine", model, model, "--out", out], "one name"),
        (["remove-task", str(tmp_path / "no"), "a", "--out", out], "does not exist"),
        (["add-task", model, str(merged / "eurosat"), "--name", "SVHN", "--budget", "1", "--out", out], "already"),  # fmt: skip
    ):
        with pytest.raises(SystemExit, match=f"Error: .*{text}"):
            run_whole(monkeypatch, *line)
    for line, text in (
        (["library", out, "--task", "a"], "do nothing"),
        (["library", out, "--remove"], "requires an argument"),
    ):
        with pytest.raises(SystemExit):
            run_whole(monkeypatch, *line)
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
