"""The commands do what the functions do, and say what is wrong in one line."""

import pytest
from conftest import build_tiny_clip
from fusion_bench.modelpool import CLIPVisionModelPool
from helpers import didi

from fusion_bench_didi.editing import AdapterLibrary
from fusion_bench_didi.editing.command import main
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


def test_a_session_of_edits(merged, tmp_path, capsys):
    one, three, two = (str(tmp_path / name) for name in ("one", "three", "two"))
    small, both = str(tmp_path / "small"), str(tmp_path / "both")
    add = ["add", str(merged / "merged"), str(merged / "eurosat"), "--name", "eurosat"]
    main([*add, "--budget", "0.15", "--out", three, "--base", str(merged / "_pretrained_")])  # fmt: skip
    assert DiDiModel.from_pretrained(three).tasks == ["mnist", "svhn", "eurosat"]
    said = capsys.readouterr().out
    assert "3 tasks: mnist, svhn, eurosat" in said and "is lost" in said
    main(["remove", three, "eurosat", "--out", two])
    main(["remove", three, "svhn", "--overwrite"])
    main(["remove", three, "mnist", "--out", one])
    assert DiDiModel.from_pretrained(three).tasks == ["mnist", "eurosat"]
    main(["combine", two, one, "--out", both])
    assert DiDiModel.from_pretrained(both).tasks == ["mnist", "svhn", "eurosat"]
    main(["rescale", both, "--budget", "0.2", "--out", small])
    assert 0.15 < DiDiModel.from_pretrained(small).storage.x_excl <= 0.2
    capsys.readouterr()
    library = str(tmp_path / "library")
    main(["library", library, "--add", both, "--task", "svhn", "--task", "eurosat"])
    main(["library", library, "--remove", "--task", "svhn"])
    assert "svhn" not in capsys.readouterr().out.split("eurosat")[-1]
    assert AdapterLibrary(library).load("eurosat").tasks == ["eurosat"]


def test_what_is_wrong_is_said_in_one_line(merged, tmp_path):
    model, out = str(merged / "merged"), str(tmp_path / "out")
    for line, text in (
        (["remove", model, "mnist"], "written nowhere"),
        (["remove", model, "none", "--out", out], "'none' is not in"),
        (["rescale", model, "--budget", "7", "--out", out], "no smaller"),
        (["combine", model, model, "--out", out], "one name"),
        (["remove", str(tmp_path / "no"), "a", "--out", out], "does not exist"),
        (["library", out, "--task", "a"], "do nothing"),
        (["library", out, "--remove"], "no --task"),
        (["add", model, str(merged / "eurosat"), "--name", "SVHN", "--budget", "1", "--out", out], "already"),  # fmt: skip
    ):
        with pytest.raises(SystemExit, match=f"error: .*{text}"):
            main(line)
    assert not (tmp_path / "out").exists()
