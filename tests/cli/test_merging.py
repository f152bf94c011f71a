"""``didi merge``: what it takes models for, and what it refuses before it reads them."""

from pathlib import Path

import pytest
import torch
from commands import run
from helpers import BASE
from safetensors.torch import load_file
from transformers import CLIPVisionModel

import fusion_bench_didi

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
