"""``didi export``: a saved merged model in, a directory and a report out."""

import pytest
import torch
from commands import run, run_whole
from exact_models import llama
from fusion_bench.modelpool import CausalLMPool
from helpers import BASE, family
from peft import AutoPeftModelForCausalLM

from fusion_bench_didi import DiDiMerging
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.export import export

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merged model whose base model lies in a directory."""
    place = tmp_path_factory.mktemp("export")
    for name, model in family(llama()).items():
        model.save_pretrained(place / name)
    pool = {name: str(place / name) for name in (BASE, "mnist", "svhn")}
    pool = CausalLMPool(pool, tokenizer=None)
    model = DiDiMerging(budget=0.5, refine_sweeps=2).run(pool)
    model.save_pretrained(place / "merged")
    return place, model


def test_adapters_are_found_with_their_base_model(merged, tmp_path):
    place, model = merged
    line = f"export {place}/merged {tmp_path}/out --form peft --task svhn -s carry=all"
    assert "svhn:" in run(*line.split())
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out/svhn")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        wanted = model.materialize("svhn")(ids).logits
        assert torch.allclose(found(ids).logits, wanted, rtol=0, atol=1e-5)


def test_a_base_model_that_moved_is_named(merged, tmp_path, monkeypatch):
    place, _ = merged
    moved = tmp_path / "moved"
    (place / BASE).rename(moved)
    try:
        with pytest.raises(SystemExit, match="no directory is any more"):
            run_whole(
                monkeypatch,
                *f"export {place}/merged {tmp_path}/out --form plain".split(),
            )
        run(
            *f"export {place}/merged {tmp_path}/out --form plain --base {moved}".split()
        )
    finally:
        moved.rename(place / BASE)
    assert (tmp_path / "out/mnist/config.json").is_file()


def test_a_task_whose_name_is_no_name_of_a_directory_is_found(merged, tmp_path):
    place, _ = merged
    models = (place / BASE, f"a/b={place / 'mnist'}", place / "svhn")
    run("merge", *models, "-o", tmp_path / "odd", "-s", "refine_sweeps=2")
    told = run("export", tmp_path / "odd", tmp_path / "out", "--form", "plain")
    assert "svhn lies in" not in told
    assert "a/b lies in a%2Fb" in told and (tmp_path / "out" / "a%2Fb").is_dir()


def test_refusals_come_before_the_model_is_read(merged, tmp_path, monkeypatch):
    place, _ = merged
    with pytest.raises(SettingsError, match="max_rank: of form=peft, not patch"):
        export(place / "nothing", tmp_path / "out", form="patch", max_rank=3)
    with pytest.raises(SettingsError, match="form='onnx' is none of"):
        export(place / "nothing", tmp_path / "out", form="onnx")
    with pytest.raises(SystemExit, match="does not exist"):
        run_whole(
            monkeypatch, *f"export {place}/nothing {tmp_path}/out --form plain".split()
        )
    with pytest.raises(SystemExit, match="exists"):
        run_whole(monkeypatch, *f"export {place}/nothing {place} --form plain".split())
