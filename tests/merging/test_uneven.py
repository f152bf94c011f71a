"""Entries of heavy tails, or few that are far above the others: widths are priced by what rounding loses of them."""

import pytest
import torch
from helpers import merge_settings, normal, task_vectors
from torch import Tensor, nn

from fusion_bench_didi.allocation.experts_curve import ExpertsCurve
from fusion_bench_didi.deltas.precision import precisions
from fusion_bench_didi.lowrank.row_blocks import row_norms
from fusion_bench_didi.merging.forms.uneven import at_its_price, dense_beyond_gaussian
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.task_vectors.reader import TaskVectors

ALLOWED = precisions("auto", torch.float32)
WIDTHS = {allowed.name: i for i, allowed in enumerate(ALLOWED)}


def heavy(*shape: int, seed: int) -> Tensor:
    """Student's t of three degrees of freedom, to the power 3/2 in the tails."""
    chi = normal(3, *shape, seed=seed + 100).square().mean(0).sqrt()
    return normal(*shape, seed=seed) / (chi + 1e-9) ** 1.5


def pool(*changes: list[Tensor]) -> TaskVectors:
    """Tasks that change matrices so, one list each."""
    models = {}
    zeros = [torch.zeros_like(change) for change in changes[0]]
    for task, own in zip(("_pretrained_", *"abcdefgh"), (zeros, *changes)):
        models[task] = nn.ParameterList(own)
    return task_vectors(models)


def beyond(*changes: Tensor) -> tuple[float, ...]:
    tensor = pool(*([change] for change in changes)).tensor("0", "cpu")
    return dense_beyond_gaussian(tensor, row_norms(tensor.differences()), ALLOWED)


def test_error_does_not_rise_with_the_budget():
    shapes = [(129, 257), (64, 500), (300, 2), (900,)]
    vectors = pool(
        *([heavy(*s, seed=10 * t + i) for i, s in enumerate(shapes)] for t in range(3))
    )
    least = 1.0
    for budget in (0.25, 0.5, 1.0, 1.4, 2.0):
        found = merge(vectors, merge_settings(budget, factor_dtype="auto", gain="none"))
        assert found.report.relative_error <= 1.02 * least + 1e-4
        least = found.report.relative_error
    assert least < 2e-4


@pytest.mark.parametrize("factor_dtype", ["auto", "int2", "int3"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        torch.eye(64),
        torch.eye(64)[torch.arange(64) ** 2 % 67 % 64],
        normal(64, 64).sign(),
    ],
    ids=["diagonal", "few columns", "signs"],
)
def test_no_expert_loses_more_than_nothing_would(change, shared, factor_dtype):
    """Directions of one entry in codes that have no zero, and values of one size."""
    second = change if shared else change.roll(7, 0)
    tasks = [0.01 * change], [0.01 * second]
    gain = {"gain": "none"} if factor_dtype == "auto" else {}
    for budget in (0.05, 0.1, 0.3):
        settings = merge_settings(budget, factor_dtype=factor_dtype, **gain)
        found = merge(pool(*tasks), settings)
        lost, energy = found.report.errors["0"], found.report.energy["0"]
        if "0" in found.shared:
            lost, energy = lost.sum(), energy.sum()
        assert bool((lost <= energy * (1 + 1e-9)).all())
        for task in "ab":
            rank = found.ranks.experts[task]["0"]
            assert bool(rank) == ("0" in found.experts[task])


@pytest.mark.parametrize("shape", [(64, 96), (3000, 40), (40, 3000), (1, 5000)])
def test_normal_entries_are_priced_as_before(shape):
    tasks = [normal(*shape, seed=seed) for seed in range(3)]
    assert not any(beyond(*tasks))
    mask = torch.arange(shape[0])[:, None] % 8 == 0
    assert not any(beyond(*(task * mask for task in tasks)))


def test_one_entry_is_found_among_very_many():
    tasks = [normal(3000, 200, seed=seed) for seed in range(3)]
    for task in tasks:
        task[1234, 56] = 2e3
    found = beyond(*tasks)
    assert all(found[WIDTHS[width]] > 0.5 for width in ("int2", "int3", "int4"))
    assert found[WIDTHS["float32"]] == 0


def test_what_is_measured_is_what_is_lost():
    """On half of the rows and those of most energy, within a few percent."""
    tasks = [heavy(1000, 120, seed=seed) for seed in range(2)]
    terms = [(task, None) for task in tasks]
    found = beyond(*tasks)
    for width in ("int2", "int4"):
        precision = ALLOWED[WIDTHS[width]]
        _, lost = precision.dense((1000, 120), terms)
        parts = [
            float(error / task.double().square().sum())
            for error, task in zip(lost, tasks)
        ]
        expected = sum(parts) / len(parts) - precision.rounding_dense
        assert found[WIDTHS[width]] == pytest.approx(expected, rel=0.05)


def test_a_vector_of_one_entry_is_kept_whole_or_left_alone():
    one = torch.zeros(3000)
    one[0] = 1.0
    vectors = pool([one], [-one])
    for budget in (0.2, 0.3, 0.6):
        settings = merge_settings(budget, factor_dtype="auto")
        assert merge(vectors, settings).report.relative_error <= 1.0


@pytest.mark.parametrize("rank", [4, 16], ids=["low rank", "whole"])
@pytest.mark.parametrize("more", [0.0, 0.2])
def test_a_shared_part_that_nothing_is_beside_costs_what_rounding_loses_of_it(
    rank, more
):
    precision = ALLOWED[WIDTHS["int2"]]
    usual = precision.rounding_dense if rank == 16 else precision.rounding
    for left, counted in ((0.0, usual + more), (1e3, more)):
        tail = torch.full((3,), left)
        rate, nothing = precision.rate(16, 16), torch.zeros(3, 0)
        curve = ExpertsCurve(rank, rate, torch.ones(3), nothing, tail, 16)
        priced = at_its_price(curve, precision, more, 10.0)
        torch.testing.assert_close(priced.tail_energy, tail + 10 * counted)
