"""The YAML of the method is its constructor: the same names, in the same order, with the same values."""

import inspect
import re

import pytest
from helpers import REPOSITORY
from omegaconf import OmegaConf

from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.method.didi import DiDiMerging

CONFIG = REPOSITORY / "config" / "method"


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
        "ties_keep": 0.456,
        "residual": "full",
        "allocation": "learned",
        "warm_start": False,
        "rank_steps": 7,
        "rank_lr": 0.07,
        "beta_start": 0.77,
        "beta_end": 7.7,
        "penalty": 77.0,
        "coupling": False,
        "rank_shift": 0.25,
        "rank_fallback": False,
        "refinement": "adam",
        "refine_steps": 66,
        "refine_lr": 0.066,
        "normalization": "matrix",
        "vectors": "shared",
        "factor_dtype": "bfloat16",
        "factor_memory_gb": 0.5,
    }
    alternating = {"refine_sweeps": 6, "refine_tolerance": 0.06}
    elsewhere = {
        "exclude",
        "own",
        "as_vectors",
        "task_aliases",
        "dry_run",
        "output_dir",
        "overwrite",
        "resume",
    }
    elsewhere.add("_target_")
    alone = {"shared_scale", "max_rank", "gain", "quantizer", *alternating}
    assert set(config) == set(reach) | elsewhere | alone
    assert DiDiMerging(**alternating).settings().refining.sweeps == 6
    assert DiDiMerging(**alternating).settings().refining.tolerance == 0.06
    scaled = DiDiMerging(shared="task_arithmetic", shared_scale=0.123)
    assert scaled.settings().shared_scale == 0.123
    assert DiDiMerging(gain="none").settings().gain == "none"
    assert DiDiMerging(quantizer="trellis").settings().quantizer == "trellis"
    limited = DiDiMerging(max_rank=7, vectors="pretrained")
    assert limited.settings().max_rank == 7
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
        "rank_shift": settings.learning.shift,
        "rank_fallback": settings.learning.fallback,
        "refine_steps": settings.refining.steps,
        "refine_lr": settings.refining.lr,
    }
    assert {name: found[name] for name in reach} == reach


COLD = {"allocation": "learned", "warm_start": False}


@pytest.mark.parametrize(
    "choice, what",
    [
        ({"residual": "full"}, "residual=full with factor_dtype=auto"),
        (
            {"residual": "full", "shared": "none", "factor_dtype": "float32"},
            "residual=full with shared=none",
        ),
        (
            {"residual": "full", "shared": "subspaces", "factor_dtype": "float32"},
            "residual=full with shared=subspaces",
        ),
        (
            {"allocation": "uniform", "factor_dtype": "float32"},
            "residual=truncated with allocation=uniform",
        ),
        (
            {"allocation": "uniform", "factor_dtype": "int4", "shared": "subspaces"},
            "Set allocation=greedy, or shared=none",
        ),
        ({"allocation": "learned"}, "allocation=learned from a warm start"),
        (
            {"allocation": "learned", "shared": "none", "factor_dtype": "int4"},
            "allocation=learned from a warm start",
        ),
        ({"warm_start": False}, "warm_start is of allocation=learned"),
        ({"rank_steps": 7}, "rank_steps is of allocation=learned"),
        ({"rank_lr": 0.1}, "rank_lr is of"),
        ({"beta_start": 0.1}, "beta_start is of"),
        ({"beta_end": 0.1}, "beta_end is of"),
        ({"penalty": 0.1}, "penalty is of"),
        ({"coupling": False}, "coupling is of"),
        ({**COLD, "coupling": False}, "coupling is of residual=full"),
        (
            {**COLD, "coupling": False, "shared": "none", "factor_dtype": "int8"},
            "coupling is of residual=full",
        ),
        ({"refine_steps": 5}, "refine_steps is of refinement=adam, not alternating"),
        ({"refine_lr": 5.0}, "refine_lr is of refinement=adam"),
        (
            {"refinement": "adam", "refine_sweeps": 5},
            "refine_sweeps is of refinement=alternating",
        ),
        (
            {"refinement": "none", "refine_tolerance": 0.1},
            "refine_tolerance is of refinement=alternating",
        ),
        ({"shared": "none", "refine_sweeps": 5}, "nothing couples the experts"),
        (
            {"shared": "none", "refinement": "adam", "refine_steps": 5},
            "refine_steps: with shared=none nothing couples the experts",
        ),
        (
            {"shared": "none", "refinement": "adam", "refine_lr": 0.5},
            "refine_lr: with shared=none nothing couples the experts",
        ),
        (
            {"shared": "none", "refinement": "adam"},
            "refinement=adam: with shared=none nothing couples the experts",
        ),
        ({"shared_scale": 0.4}, "shared_scale is of shared=task_arithmetic"),
        ({"ties_keep": 0.4}, "ties_keep is of shared=ties"),
        ({"overwrite": True}, "overwrite is of output_dir"),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused_at_birth(choice, what):
    with pytest.raises(SettingsError, match=re.escape(what)):
        DiDiMerging(**choice)


def test_all_ineffective_settings_are_named_at_once():
    with pytest.raises(SettingsError) as caught:
        DiDiMerging(rank_steps=7, shared_scale=0.5, refine_lr=0.5)
    assert len(str(caught.value).splitlines()) == 4


def test_a_misspelt_setting_is_refused():
    with pytest.raises(SettingsError, match="no setting bugdet. Did you mean budget?"):
        DiDiMerging(bugdet=0.5)


def test_settings_of_the_last_release_still_do_what_they_did():
    with pytest.warns(
        DeprecationWarning, match="normalisation is called normalization"
    ):
        method = DiDiMerging(normalisation="matrix")
    assert method.settings().normalization == "matrix"
    with pytest.warns(DeprecationWarning, match="metric has no effect"):
        DiDiMerging(metric="none", probe_samples=32)
    with pytest.raises(SettingsError, match="no setting metric"):
        DiDiMerging(metric="probes")
