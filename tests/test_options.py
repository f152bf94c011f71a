"""Settings are converted to their types and held to their ranges, whoever gives them."""

import math

import pytest
from fusion_bench import BaseModelPool
from helpers import didi
from omegaconf import OmegaConf

from fusion_bench_didi import Budget, DiDiMerging, MergeSettings
from fusion_bench_didi.allocation.learned import LearningSettings
from fusion_bench_didi.errors import BudgetError, DiDiError, SettingsError
from fusion_bench_didi.lowrank.refinement import RefinementSettings

LEARNED = {
    "allocation": "learned",
    "shared": "mean",
    "residual": "full",
    "factor_dtype": "float32",
}
#: What makes each setting one that is read.
BESIDE = {
    "shared_scale": {"shared": "task_arithmetic"},
    "ties_keep": {"shared": "ties"},
    "rank_steps": LEARNED,
    "rank_lr": LEARNED,
    "beta_start": LEARNED,
    "beta_end": LEARNED,
    "penalty": LEARNED,
    "rank_shift": LEARNED,
    "refine_steps": {"refinement": "adam"},
    "refine_lr": {"refinement": "adam"},
}
NUMBERS = (
    *BESIDE,
    "budget",
    "refine_sweeps",
    "refine_tolerance",
    "factor_memory_gb",
)
NONSENSE = (math.nan, -math.inf, -1e9, "many", None, [], {}, object(), b"\xff")


@pytest.mark.parametrize("name", NUMBERS)
def test_value_that_is_no_such_number_is_refused_at_construction(name):
    for value in NONSENSE:
        with pytest.raises(DiDiError, match=name):
            DiDiMerging(**{**BESIDE.get(name, {}), name: value})


@pytest.mark.parametrize("name", [*BESIDE, "refine_sweeps"])
def test_number_that_no_calculation_survives_is_refused(name):
    for value in (1e308, 2**70, math.inf):
        with pytest.raises(SettingsError, match=name):
            DiDiMerging(**{**BESIDE.get(name, {}), name: value})


@pytest.mark.parametrize("budget", [1e308, 1e30, math.inf, 2**70])
def test_budget_without_bounds_keeps_every_task_whole(tiny_clip, budget):
    model = didi(tiny_clip.pool_models(), budget=budget)
    for task, tuned in tiny_clip.tuned.items():
        built = model.materialize(task).state_dict()
        for name, value in tuned.state_dict().items():
            assert (built[name] - value).abs().max() < 1e-6


@pytest.mark.parametrize(
    "name, value",
    [
        ("warm_start", "perhaps"),
        ("budget_includes_backbone", []),
        ("coupling", 2),
        ("dry_run", "maybe"),
        ("output_dir", ""),
        ("output_dir", 3),
        ("task_aliases", ["a"]),
        ("exclude", 3),
        ("exclude", [3]),
        ("shared", "some"),
        ("factor_dtype", "int5"),
        ("allocation", ""),
    ],
)
def test_value_of_another_type_is_refused_by_its_name(name, value):
    with pytest.raises(SettingsError, match=name):
        DiDiMerging(**{name: value})


def test_numbers_written_as_text_are_numbers(tiny_clip):
    method = DiDiMerging(budget="0.5", refine_sweeps="3", budget_includes_backbone="no")
    assert (method.budget, method.refine_sweeps) == (0.5, 3)
    assert method.budget_includes_backbone is False
    method.run(BaseModelPool(tiny_clip.pool_models()))


def test_all_faults_come_in_one_error():
    with pytest.raises(SettingsError) as caught:
        DiDiMerging(budget="x", refine_sweeps=-1, shared="some")
    for name in ("budget", "refine_sweeps", "shared"):
        assert name in str(caught.value)


def test_lists_of_a_configuration_are_lists():
    patterns = OmegaConf.create({"p": ["*bias*"]}).p
    assert DiDiMerging(exclude=patterns).tensor_patterns()["exclude"] == ("*bias*",)


def test_groups_of_settings_check_themselves():
    for make in (
        lambda: RefinementSettings(sweeps=-1),
        lambda: RefinementSettings(tolerance=math.nan),
        lambda: LearningSettings(lr=0),
        lambda: LearningSettings(coupled="perhaps"),
        lambda: MergeSettings(Budget(1.0), shared="some"),
        lambda: MergeSettings(Budget(1.0), shared="ties", ties_keep=0),
    ):
        with pytest.raises(SettingsError):
            make()
    for ratio in (math.nan, 0, -1):
        with pytest.raises(BudgetError):
            Budget(ratio)
