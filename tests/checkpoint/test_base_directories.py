"""Directories of base models that a saved model names, made to do harm: refused, or read as data and never waited for."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hostile_directories import MARK, Bomb, merged_language_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from fusion_bench_didi.checkpoint import loaders
from fusion_bench_didi.checkpoint.backbone import differing_computation
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.service.opening import open_runner


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The directory of a base model within the one of a merge."""
    merged_language_model(tmp_path / "merged", "base")
    return tmp_path / "merged" / "base"


def configure(base: Path, **values: object) -> None:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(base: Path, message: str = "backbone") -> None:
    with warnings.catch_warnings(), pytest.raises(DiDiError, match=message):
        warnings.simplefilter("ignore")
        DiDiModel.from_pretrained(base.parent)


# --- nothing runs -------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "0.bin"])
def test_a_pickle_in_place_of_weights_does_not_run(base, tmp_path, name):
    (base / "model.safetensors").unlink()
    torch.save({"wte.weight": Bomb(tmp_path / MARK)}, base / name)
    if name == "0.bin":
        index = {"metadata": {}, "weight_map": {"wte.weight": name}}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(base)
    assert not (tmp_path / MARK).exists()


CODE = {
    "auto_map": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    "class": {"tokenizer_class": "EvilTokenizer"},
    "both": {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
    },
    "nothing": {},
    "list": [],
}


@pytest.mark.parametrize("how", CODE)
def test_a_tokenizer_beside_a_base_model_does_not_run(base, tmp_path, monkeypatch, how):
    """The server reads one; what cannot be read is named, whatever transformers raises."""
    code = f"open({str(tmp_path / MARK)!r}, 'w')\nclass Evil: ...\n"
    for name in ("evil.py", "tokenization_evil.py"):
        (base / name).write_text(code)
    (base / "tokenizer_config.json").write_text(json.dumps(CODE[how]))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    with pytest.raises(CheckpointMismatchError, match="has no Tokenizer"):
        open_runner(base.parent)
    assert not (tmp_path / MARK).exists()


def test_a_tokenizer_beside_a_base_model_is_read(base, monkeypatch):
    """Of a place that is relative to the merge, wherever the server is started."""
    inner = Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(base)
    monkeypatch.chdir("/")
    (tokenizer,) = set(open_runner(base.parent).tokenizers.values())
    assert tokenizer("a")["input_ids"] == [0]


# --- nothing outside ----------------------------------------------------------


@pytest.mark.parametrize("shard", ["../outside", "/outside", 3])
@pytest.mark.parametrize("index", loaders.index_files())
def test_shards_of_a_base_model_lie_beside_their_index(base, index, shard):
    shutil.copy(base / "model.safetensors", base.parent / "outside")
    (base / "model.safetensors").unlink()
    name = f"{base.parent}{shard}" if shard == "/outside" else shard
    content = {"metadata": {}, "weight_map": {"transformer.wte.weight": name}}
    (base / index).write_text(json.dumps(content))
    refused(base, "expected files beside it")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors"])
def test_a_configuration_names_weights_beside_it(base, name):
    os.rename(base / "model.safetensors", base.parent / "outside.safetensors")
    if name.startswith("/"):
        name = f"{base.parent}{name}"
    configure(base, transformers_weights=name)
    refused(base, "expected a file beside it")


# --- nothing for ever ---------------------------------------------------------


@pytest.mark.parametrize("how", ["n_layer", "parts"])
def test_layers_that_no_weights_are_for_are_not_built(base, how):
    """transformers would build them one by one."""
    layers = {"n_layer": 10**9}
    configure(base, **(layers if how == "n_layer" else {"parts": [layers]}))
    refused(base, r"config.json says n_layer=1000000000, .* are \d+ tensors")


def as_pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def as_device(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [as_pipe, as_device])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_of_a_base_model_is_not_waited_for(base, put, name):
    put(base / name)
    refused(base)


@pytest.mark.parametrize("put", [as_pipe, as_device, Path.mkdir])
def test_weights_of_open_clip_are_a_file(monkeypatch, tmp_path, put):
    from fusion_bench.models import open_clip

    monkeypatch.setattr(open_clip, "ImageEncoder", lambda _: nn.Linear(2, 2))
    put(tmp_path / "base.pt")
    source = {"model_name": "ViT-B-32", "state_dict_path": str(tmp_path / "base.pt")}
    with pytest.raises(DiDiError, match="base.pt is no file"):
        loaders.load(loaders.OPEN_CLIP, source, directory=tmp_path)


@pytest.mark.parametrize("how", ["its own", "another"])
def test_a_base_model_without_a_configuration_is_not_made_of_default_settings(
    base, monkeypatch, how
):
    """transformers would, of any size, before it misses what the weights lack."""
    (base / "config.json").unlink()
    monkeypatch.setattr(GPT2LMHeadModel, "__init__", None)
    given = {} if how == "its own" else {"backbone": base}
    with pytest.raises(DiDiError, match=f"the backbone: {base} has no config.json"):
        DiDiModel.from_pretrained(base.parent, **given)


def test_the_configuration_may_lie_in_a_subfolder(base):
    inside = base / "inside"
    inside.mkdir()
    for file in ("config.json", "model.safetensors"):
        os.rename(base / file, inside / file)
    source = {loaders.PLACE: str(base), "subfolder": "inside"}
    class_name = "transformers.GPT2LMHeadModel"
    found, fresh = loaders.load(class_name, source, directory=base.parent)
    assert isinstance(found, GPT2LMHeadModel) and not fresh
    (inside / "config.json").unlink()
    with pytest.raises(DiDiError, match=f"{inside} has no config.json"):
        loaders.load(class_name, source, directory=base.parent)


# --- nothing random -----------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["h.0.mlp.c_fc.weight", "h.0.attn.c_attn.weight", "wpe.weight"]
)
def test_tensors_that_a_base_model_has_lost_are_not_drawn_at_random(base, name):
    """transformers does, with a warning, where a checkpoint took the place of the one that was merged."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"transformer.{name}"]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(base, f"its weights differ .*{name}")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"n_head": 1}, "computes something else .*n_head: 2 != 1"),
        ({"layer_norm_epsilon": 0.1}, "computes something else .*layer_norm_epsilon"),
        ({"activation_function": "relu"}, "computes something else .*activation_fu"),
        ({"n_layer": 2}, "its weights differ"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["its own", "given"])
def test_a_base_model_of_equal_weights_that_computes_something_else_is_refused(
    base, tmp_path, change, told, where
):
    """It was loaded, with a layer at random values where there was one more."""
    given = shutil.copytree(base, tmp_path / "other") if where == "given" else base
    configure(given, **change)
    with pytest.raises(CheckpointMismatchError, match=told):
        DiDiModel.from_pretrained(base.parent, None if given == base else given)


def test_settings_that_change_no_output_may_differ(base):
    configure(base, attn_pdrop=0.3, use_cache=False, pad_token_id=1, transformers_version="1")  # fmt: skip
    DiDiModel.from_pretrained(base.parent)


def test_what_releases_of_transformers_write_otherwise_is_no_difference():
    """Of 379 kinds of models that both 4 and 5 know, three had such settings."""
    one = {"layer_types": None, "sliding_window": 0, "rope_theta": 10000}
    other = {"layer_types": ["full"], "sliding_window": None, "rope_theta": 10000.0}
    assert differing_computation({"computes": one}, {"computes": other}) == []
    changed = {**other, "sliding_window": 8}
    assert differing_computation({"computes": one}, {"computes": changed}) == ["sliding_window: 0 != 8"]  # fmt: skip
    assert differing_computation({}, {"computes": other}) == []  # of earlier releases
