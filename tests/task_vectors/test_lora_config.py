"""Configurations of adapters that are none, or made to do harm."""

import time

import pytest
from fuzz import limits
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.task_vectors import lora_config
from fusion_bench_didi.task_vectors.lora_config import (
    PLAIN,
    VARIANTS,
    LoraSettings,
    variants,
)


@pytest.mark.parametrize("pattern", ["(a|aa)+$x", "(?:(?:a?){90}){90}b", "((a*)*)*b"])
def test_patterns_that_never_end_are_refused(monkeypatch, pattern):
    monkeypatch.setattr(lora_config, "MATCH_SECONDS", 0.2)
    config = {"peft_type": "LORA", "r": 4, "rank_pattern": {pattern: 2}}
    name = "model.layers.0." + "a" * 80
    assert variants(config) == []
    try:
        assert LoraSettings.of(config).rank_of(name) == 4
    except CheckpointMismatchError as error:
        assert repr(pattern) in str(error) and "without nested" in str(error)


def test_many_patterns_that_are_nearly_too_slow_are_refused(monkeypatch):
    """Each alone is within the limit; with every module of a model they would take days."""
    monkeypatch.setattr(lora_config, "MATCH_SECONDS", 0.3)
    slow = "a" * 22 + "b"
    patterns = {f"(a|aa)+{i}": 2 for i in range(1000)}
    config = {"peft_type": "LORA", "r": 4, "rank_pattern": patterns}
    assert variants(config) == []
    started, settings = time.monotonic(), LoraSettings.of(config, "mnist")
    with pytest.raises(CheckpointMismatchError, match="^mnist: .*what was slow before"):
        for i in range(1000):
            settings.rank_of(f"layers.{i}.{slow}")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "pattern",
    [
        "(((a{1000}){1000}){1000}){1000}",
        "(?:(?:x{1,300}){,300}){2}",
        "((layers.{ 999 }){0,999})",
    ],
)
def test_patterns_that_take_memory_are_refused_before_they_do(pattern):
    """One of 31 characters took gigabytes before a name was matched."""
    with limits():
        (fault,) = variants({"peft_type": "LORA", "rank_pattern": {pattern: 2}})
    assert "repeats nothing more than 10000 times" in fault
    plain = {"peft_type": "LORA", "rank_pattern": {r"layers\.\d{1,3}\.q": 2}}
    assert variants(plain) == []
    assert LoraSettings.of({"r": 4, **plain}).rank_of("model.layers.12.q") == 2


@pytest.mark.parametrize(
    "change",
    [
        {"r": "8"},
        {"r": 0},
        {"r": True},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "16"},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": "8"}},
        {"rank_pattern": {"q_proj": -1}},
        {"rank_pattern": {"(": 8}},
        {"rank_pattern": {"(?R)*": 8}},
        {"rank_pattern": {"a{99999999999}": 8}},
        {"rank_pattern": {"a" * 2000: 8}},
        {"alpha_pattern": {"q_proj": [1]}},
        {"alpha_pattern": 8},
        {"use_rslora": "false"},
        {"fan_in_fan_out": 1},
        {"ensure_weight_tying": "no"},
        {"use_dora": "yes"},
        {"use_what_comes_next": True},
        {"what_comes_next_config": {"rank": 2}},
        {"enable_lora": [True, False, True]},
        {"target_modules": [3]},
        {"target_modules": "(q_proj"},
        {"exclude_modules": {"q_proj": 1}},
        {"layers_to_transform": ["0"]},
        {"layers_pattern": ["layers", "h("]},
        {"modules_to_save": "lm_head"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_settings_of_adapters_that_are_none_are_faults(change):
    (fault,) = variants({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **change})
    assert next(iter(change)) in fault and "expected" in fault


NAMES = (
    *("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
    *("model.layers.1.mlp.up_proj", "q_proj", "lm_head", "other_q_proj"),
    *("blocks.1.q_proj", "model.layers.11.self_attn.q_proj", "model.embed_tokens"),
)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj", "embed_tokens"]},
        {"target_modules": r".*\.(q|up)_proj"},
        {"target_modules": "q_proj|lm_head"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 11]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    ],
    ids=str,
)  # fmt: skip
def test_modules_are_targeted_as_peft_finds_them(config):
    if isinstance(config.get("layers_pattern"), str):
        pytest.importorskip("peft", "0.20", reason="takes a text for its letters")
    settings = LoraSettings.of(LoraConfig(**config).to_dict())
    for name in NAMES:
        found = check_target_module_exists(LoraConfig(**config), name)
        found = bool(found) and type(found).__name__ != "_ExcludedModule"
        assert settings.targets(name) is found, name


def test_every_setting_of_peft_is_known():
    """A release that adds one makes this fail: is it a variant, or does it change nothing?"""
    ours = {*VARIANTS, *PLAIN, "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    ours |= {"fan_in_fan_out", "init_lora_weights", "peft_type", "ensure_weight_tying"}
    of_training = {"lora_dropout", "inference_mode", "task_type", "qalora_group_size"}
    of_files = {"base_model_name_or_path", "revision", "peft_version", "auto_mapping"}
    of_places = {"target_modules", "exclude_modules", "layers_to_transform"}
    of_places |= {"layers_pattern", "modules_to_save", "bias", "megatron_core"}
    assert set(LoraConfig().to_dict()) <= ours | of_training | of_files | of_places


@pytest.mark.parametrize("text", ["[1, 2]", '"r"', "3", "[[1, 2]]", "{", "\xff", ""])
def test_configurations_of_adapters_that_are_none(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointMismatchError, match="mnist: .*adapter_config.json"):
        lora_config.read_config(tmp_path, "mnist")
