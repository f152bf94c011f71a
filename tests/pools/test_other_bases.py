"""An adapter's base model is the pool's, or is told of: by its weights where it is there, and by its name otherwise."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import BASE, didi
from lora_families import llamas
from safetensors.torch import load_file, save_file

from fusion_bench_didi.pools.other_bases import same_model


def weights(directory: Path, change: float = 0.0, name="model.safetensors") -> Path:
    directory.mkdir(parents=True)
    values = torch.arange(5000.0)
    values[3000] += change
    save_file({"weight": values}, directory / name)
    return directory


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("meta/llama", "meta/llama", True),
        ("meta/Llama", "meta/llama/", True),
        ("meta/llama", "other/llama", False),
        ("gpt2", "openai-community/gpt2", True),
        ("meta/llama", "meta/llama-instruct", False),
        ("meta/llama", "/data/models/llama", True),
        ("meta/llama", "/data/models/llama-instruct", False),
        ("meta/llama", "~/models/llama/", True),
        ("/data/stage1/final", "/data/stage2/final", False),
        ("/data//stage1/final/", "/data/stage1/./final", True),
        ("~/final", os.path.expanduser("~/final"), True),
        ("meta/llama", "/c/hub/models--meta--llama/snapshots/0af3", True),
        ("meta/llama", "/c/hub/models--other--llama/snapshots/0af3", False),
        ("~nobody-of-this-name/a", "a" * 5000, False),
        ("a\0b", "/a", False),
    ],
)
def test_names_of_models_that_are_not_there(one, other, same):
    assert same_model(one, other) is same
    assert same_model(other, one) is same


@pytest.mark.parametrize("change", [0.0, 1.0])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_directories_are_compared_by_their_weights(tmp_path, change, name):
    """Stages of training have one name in many directories, and a copy may have any."""
    one = weights(tmp_path / "stage1" / "final", name=name)
    other = weights(tmp_path / "stage2" / "final", change, name)
    renamed = weights(tmp_path / "copy", change, name)
    assert same_model(str(one), str(other)) is (change == 0)
    assert same_model(str(renamed), str(one)) is (change == 0)


def test_other_files_are_another_model(tmp_path):
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert same_model(str(one), str(other))
    weights(tmp_path / "more", name="model-2.safetensors")
    shutil.copy(tmp_path / "more" / "model-2.safetensors", other)
    assert not same_model(str(one), str(other))
    (tmp_path / "empty").mkdir()
    assert not same_model(str(one), str(tmp_path / "empty"))


def test_a_directory_by_another_way_is_the_same(tmp_path, monkeypatch):
    (home := weights(tmp_path / "final") / "model.safetensors").unlink()
    (tmp_path / "link").symlink_to(home.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for way in ("link", "final/", "~/final", "./final", "~/link/"):
        assert same_model(way, str(home.parent)), way


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_stage_before_the_base_model_is_told_of(llamas, change, caplog):
    directory, _, pool = llamas
    other = directory / "stage1" / BASE
    shutil.copytree(directory / BASE, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += change
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    file = directory / "svhn" / "adapter_config.json"
    config = {**json.loads(file.read_text()), "base_model_name_or_path": str(other)}
    file.write_text(json.dumps(config))
    didi(pool, budget=1.4)
    told = [r for r in caplog.messages if f"svhn on {other}" in r]
    assert len(told) == (change > 0)
