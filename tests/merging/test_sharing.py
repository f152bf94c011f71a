"""A shared part is bought only where it pays."""

import copy

import pytest
import torch
from helpers import merge_settings, task_vectors
from torch import nn

from benchmarks.overlap import constructed, merged
from fusion_bench_didi.allocation.experts_curve import ExpertsCurve
from fusion_bench_didi.allocation.lagrangian import choose
from fusion_bench_didi.deltas.precision import Precision
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.merging.settings import Budget, MergeSettings


@pytest.mark.parametrize("budget", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_sharing_never_loses(overlap, budget):
    vectors = constructed(overlap, tasks=4, side=32, matrices=2)
    both = merged(vectors, budget, "auto").report.relative_error
    alone = merged(vectors, budget, "none").report.relative_error
    assert both <= alone * 1.005


def test_common_directions_are_found_and_halve_the_storage():
    vectors = constructed(0.9, side=48, matrices=1)
    both = merged(vectors, 1.0, "mean")
    alone = merged(vectors, 2.0, "none")
    assert both.report.relative_error < alone.report.relative_error
    assert both.storage.shared_bits > 0
    nothing_common = merged(constructed(0.0, side=48, matrices=1), 1.0, "mean")
    assert nothing_common.storage.shared_bits == 0


@pytest.mark.parametrize("budget", [0.2, 0.4])
@pytest.mark.parametrize("factor_dtype", ["float32", "int8"])
def test_a_task_that_leaves_a_matrix_alone_keeps_no_others_from_sharing(
    factor_dtype, budget
):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(48, 6, generator=generator) @ torch.randn(
        6, 48, generator=generator
    )
    base = nn.ModuleList(nn.Linear(48, 48, bias=False) for _ in range(2))
    models = {"_pretrained_": base}
    for task in "abcdef":
        models[task] = copy.deepcopy(base)
        own = torch.randn(2, 48, 48, generator=generator)
        models[task][1].weight.data += 0.01 * own[1]
        if task != "c":
            models[task][0].weight.data += 0.01 * (common + 0.1 * own[0])
    settings = merge_settings(budget, factor_dtype=factor_dtype, shared="mean")
    result = merge(task_vectors(models), settings)
    assert "0.weight" in result.shared
    kept = result.report.energy_kept["0.weight"]
    assert kept[2] in (0.0, 1.0) and min(kept[:2] + kept[3:]) > 0.5


def test_choice_with_equal_candidates_takes_experts_only():
    rate = Precision("float32", 32, torch.float32).rate(16, 16)
    sigma = torch.rand(3, 8).sort(descending=True).values
    own, costlier = (
        ExpertsCurve(k, rate, torch.ones(3), sigma, torch.zeros(3), 16) for k in (0, 2)
    )
    assert choose([[own, costlier]], 10 * rate.per_rank)[0] == [0]


def test_auto_takes_coarse_numbers_when_poor_and_exact_ones_when_rich():
    vectors = constructed(0.2, tasks=3, side=32, matrices=2)

    def precision(budget):
        settings = MergeSettings(Budget(budget), allocation="greedy")
        result = merge(vectors, settings)
        assert result.storage.excl_bits <= settings.budget.bits(
            result.storage.unit_bits
        )
        return set(result.report.precision.values())

    assert precision(0.2) <= {"coded", "int2", "int3", "int4"}
    assert precision(float("inf")) == {"float32"}


@pytest.mark.parametrize("budget", [0.04, 0.06, 0.12, 0.5])
def test_thin_matrices_that_are_nearly_alike_keep_to_the_budget(budget):
    """Whole, in whole numbers, they take more than as factors of full rank."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(2, 400, bias=False)
    change = torch.randn(400, 2, generator=generator)
    models = {"_pretrained_": base}
    for task in "abcd":
        models[task] = nn.Linear(2, 400, bias=False)
        own = 0.3 * torch.randn(400, 2, generator=generator)
        models[task].weight.data = base.weight.data + 0.01 * (change + own)
    settings = MergeSettings(Budget(budget), allocation="greedy")
    storage = merge(task_vectors(models), settings).storage
    assert storage.excl_bits <= settings.budget.bits(storage.unit_bits)


@pytest.mark.parametrize("budget", [0.06, 0.3])
def test_sharing_does_not_lose_what_few_rows_or_entries_hold(budget):
    """Of which numbers of few bits lose all: rows of an embedding that all tasks change, and an entry far above all others."""
    generator = torch.Generator().manual_seed(0)
    rows, entry = torch.zeros(300, 40), torch.zeros(300, 40)
    rows[:8], entry[5, 6] = torch.randn(8, 40, generator=generator), 100.0
    base = nn.ModuleList(nn.Linear(40, 300, bias=False) for _ in range(2))
    models = {"_pretrained_": base}
    for task in "abc":
        models[task] = copy.deepcopy(base)
        own = torch.randn(2, 300, 40, generator=generator)
        changes = (rows * (1 + 0.03 * own[0]), 0.1 * (entry + own[1]))
        for layer, change in zip(models[task], changes):
            layer.weight.data += 0.01 * change
    vectors = task_vectors(models)
    both, alone = (
        merge(vectors, merge_settings(budget, factor_dtype="auto", shared=how)).report
        for how in ("auto", "none")
    )
    for name, lost in both.errors.items():
        assert (
            lost.sum()
            <= 1.1 * alone.errors[name].sum() + 1e-3 * both.energy[name].sum()
        )


def like_one_another(apart: float, tasks: int = 3) -> dict[str, nn.Module]:
    """Fine-tuned models that start from one that is fine-tuned itself."""
    generator = torch.Generator().manual_seed(0)
    base = nn.ModuleList(nn.Linear(48, 64, bias=False) for _ in range(2))
    common = torch.randn(2, 64, 48, generator=generator)
    models = {"_pretrained_": base}
    for task in "abc"[:tasks]:
        models[task] = copy.deepcopy(base)
        own = torch.randn(2, 64, 48, generator=generator)
        for layer, same, other in zip(models[task], common, own):
            layer.weight.data += 0.01 * (same + apart * other)
    return models


@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0, 1.4])
@pytest.mark.parametrize("apart", [0.0, 1e-4, 0.01, 0.1])
def test_what_rounding_of_a_shared_part_loses_is_counted_where_nothing_takes_it(
    apart, budget
):
    vectors = task_vectors(like_one_another(apart))
    both, alone = (
        merge(vectors, merge_settings(budget, factor_dtype="auto", shared=how))
        for how in ("auto", "none")
    )
    found, other = (one.report.relative_error for one in (both, alone))
    assert found <= (0.6 if apart < 0.1 else 1.1) * other + 1e-6


def test_what_is_left_of_the_budget_makes_a_shared_part_finer_that_is_all_there_is():
    vectors = task_vectors(like_one_another(0.0))
    errors = [
        merge(
            vectors, merge_settings(budget, factor_dtype="auto")
        ).report.relative_error
        for budget in (0.1, 0.3, 0.6, 1.1)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9
