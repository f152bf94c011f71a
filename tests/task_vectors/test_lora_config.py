"""Configurations of adapters that are none, or made to do harm."""

import time

import pytest
from fuzz import limits
from peft import LoraConfig

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
    ],
    ids=lambda change: str(change)[:40],
)
def test_settings_of_adapters_that_are_none_are_faults(change):
    (fault,) = variants({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **change})
    assert next(iter(change)) in fault and "expected" in fault


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
