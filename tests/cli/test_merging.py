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
