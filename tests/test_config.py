"""The YAML of the method is its constructor: the same names, in the same order, with the same values."""

import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fusion_bench_didi.method.didi import DiDiMerging

CONFIG = Path(__file__).resolve().parent.parent / "config" / "method"


def plain(value):
    """YAML has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def test_yaml_is_the_constructor():
    config = OmegaConf.to_container(OmegaConf.load(CONFIG / "didi.yaml"))
    assert config.pop("_target_") == "fusion_bench_didi.method.DiDiMerging"
    parameters = inspect.signature(DiDiMerging.__init__).parameters.values()
    named = [p for p in parameters if p.default is not inspect.Parameter.empty]
    assert list(config) == [p.name for p in named]
    assert config == {p.name: plain(p.default) for p in named}


@pytest.mark.parametrize("preset, budget", [("s", 1.24), ("m", 1.4), ("l", 2.0)])
def test_presets_set_the_budget(preset, budget):
    config = OmegaConf.load(CONFIG / "didi" / f"{preset}.yaml")
    assert config.defaults == ["/method/didi@_here_", "_self_"]
    assert {k: v for k, v in config.items() if k != "defaults"} == {"budget": budget}


def test_every_value_of_the_yaml_reaches_the_settings():
    """A parameter that is read nowhere would do nothing, silently."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIG / "didi.yaml"))
    reach = {
        "budget": 0.7,
        "budget_includes_backbone": False,
        "shared": "ties",
        "shared_scale": 0.123,
        "ties_keep": 0.456,
        "residual": "full",
        "allocation": "uniform",
        "warm_start": False,
        "rank_steps": 7,
        "rank_lr": 0.07,
        "beta_start": 0.77,
        "beta_end": 7.7,
        "penalty": 77.0,
        "coupling": False,
        "refinement": "adam",
        "refine_sweeps": 6,
        "refine_tolerance": 0.06,
        "refine_steps": 66,
        "refine_lr": 0.066,
        "normalization": "task",
        "vectors": "shared",
        "factor_dtype": "bfloat16",
        "factor_memory_gb": 0.5,
    }
    elsewhere = {
        "exclude",
        "as_vectors",
        "task_aliases",
        "dry_run",
        "metric",
        "probe_samples",
        "output_dir",
        "overwrite",
    }
    elsewhere.add("_target_")
    assert set(config) == set(reach) | elsewhere
    settings = DiDiMerging(**reach).settings()
    found = {
        **vars(settings),
        "budget": settings.budget.ratio,
        "budget_includes_backbone": settings.budget.include_backbone,
        "rank_steps": settings.learning.steps,
        "rank_lr": settings.learning.lr,
        "beta_start": settings.learning.beta_start,
        "beta_end": settings.learning.beta_end,
        "penalty": settings.learning.penalty,
        "coupling": settings.learning.coupled,
        "refine_sweeps": settings.refining.sweeps,
        "refine_tolerance": settings.refining.tolerance,
        "refine_steps": settings.refining.steps,
        "refine_lr": settings.refining.lr,
    }
    assert {name: found[name] for name in reach} == reach
