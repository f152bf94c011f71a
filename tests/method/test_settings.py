"""Settings of every method are held to their types and ranges at construction."""

import importlib

import pytest
from omegaconf import OmegaConf

from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.method import UltraDelta

STATIC = {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}
HOMES = {
    "DiDiMerging": "didi",
    "MERGE": "merge",
    "WEMoEMerging": "wemoe",
    "RoutedMethod": "routed",
    "SEMerging": "se_merging",
    "CATMerging": "baselines.cat",
    "FreeMerging": "baselines.free",
    "EMRMerging": "baselines.emr",
    "TallMaskMerging": "baselines.tall_mask",
    "TwinMerging": "baselines.twin",
    "TSVCompression": "baselines.tsv_c",
}

WRONG = [
    ("CATMerging", {"scale": "large"}),
    ("CATMerging", {"scale": float("nan")}),
    ("CATMerging", {"directions": -1}),
    ("CATMerging", {"exclude": 3}),
    ("FreeMerging", {"keep": 1.0}),
    ("FreeMerging", {"filter": "mine"}),
    ("FreeMerging", {"biases": "released"}),
    ("TallMaskMerging", {"thresholds": {"a": "high"}}),
    ("TallMaskMerging", {"ties_keep": 0}),
    ("TallMaskMerging", {"task_aliases": "a"}),
    ("TwinMerging", {"rank_fraction": 1.5}),
    ("TwinMerging", {"scale": float("inf")}),
    ("TwinMerging", {"output_dir": ""}),
    ("TSVCompression", {"rank_fraction": 0}),
    ("TSVCompression", {"fold_sigma": "perhaps"}),
    ("EMRMerging", {"exclude": {"a": 1}}),
    ("MERGE", {"objective": "best"}),
    ("MERGE", {"operators": "average"}),
    ("MERGE", {"operators": ["didi@x"]}),
    ("MERGE", {"operators": ["didi@inf"]}),
    ("MERGE", {"population": 2}),
    ("MERGE", {"clip": 0.7}),
    ("MERGE", {"components": {"all": "("}}),
    ("RoutedMethod", {"base_method": STATIC, "temperature": 0}),
    ("RoutedMethod", {"base_method": STATIC, "router_options": {"depth": 1}}),
    ("RoutedMethod", {"base_method": STATIC, "images": 1}),
    ("SEMerging", {"base_method": STATIC, "layers": "-1"}),
    ("SEMerging", {"base_method": STATIC, "total_mass": "much"}),
    ("SEMerging", {"base_method": STATIC, "didi": 3}),
    ("WEMoEMerging", {"lr": "slow"}),
    ("DiDiMerging", {"budget": True}),
    ("MERGE", {"population": True}),
    ("TwinMerging", {"scale": False}),
    ("WEMoEMerging", {"router_hidden_layers": 3}),
    ("WEMoEMerging", {"learning_rate": 1e-3}),
]


def class_of(name: str) -> type:
    home = importlib.import_module(f"fusion_bench_didi.method.{HOMES[name]}")
    return getattr(home, name)


@pytest.mark.parametrize("name, settings", WRONG, ids=str)
def test_what_is_of_another_type_or_range_is_named(name, settings):
    key = list(settings)[-1]
    named = "depth" if key == "router_options" else key.rstrip("s")
    with pytest.raises(SettingsError, match=named):
        class_of(name)(**settings)


def test_settings_of_base_classes_are_checked_and_converted():
    method = class_of("TwinMerging")(scale="0.25", exclude=OmegaConf.create(["a", "b"]))
    assert method.scale == 0.25 and method.tensor_patterns()["exclude"] == ("a", "b")
    with pytest.raises(SettingsError, match="own=7"):
        class_of("TwinMerging")(own=7)


def test_numbers_may_be_given_as_text():
    """Also where they are held against one another."""
    method = UltraDelta(drop="0.9", step="0.05")
    assert (method.drop, method.step) == (0.9, 0.05)
    with pytest.raises(SettingsError, match="drop . step = 1.1"):
        UltraDelta(drop="0.9", step="0.2")


def test_one_pattern_may_stand_for_itself():
    free = class_of("FreeMerging")(patterns="*attn*", exclude="*bias")
    assert not free._filtered("mlp.weight") and free._filtered("attn.weight")
    assert free.tensor_patterns()["exclude"] == ("*bias",)
