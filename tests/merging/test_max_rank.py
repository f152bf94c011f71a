"""A bound on the rank of what tasks change: kept by every form, and better spent before than cut afterwards."""

import pytest
import torch

from benchmarks.overlap import constructed
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.merging.settings import Budget, MergeSettings

SIDE, RANK = 64, 12


def settings(budget: float, **choice) -> MergeSettings:
    return MergeSettings(Budget(budget), **{"vectors": "pretrained", **choice})


def changes(vectors, result):
    """Of all tasks and matrices: the task vector, and what is stored of it."""
    for task, deltas in result.experts.items():
        for name in vectors.infos:
            shared, own = result.shared.get(name), deltas.get(name)
            stored = torch.zeros(SIDE, SIDE)
            if own is not None:
                stored = own.change(shared)
            elif shared is not None:
                stored = shared.change()
            source = vectors.tuned[task].read(name)
            yield source - vectors.base.read(name), stored


@pytest.mark.parametrize("budget", [0.1, 3.0, 50.0, float("inf")])
@pytest.mark.parametrize(
    "overlap, what, shared",
    [
        (0.0, "direction", "auto"),
        (0.9, "direction", "mean"),
        (0.9, "spaces", "subspaces"),
    ],
)
def test_every_form_keeps_it(overlap, what, shared, budget):
    vectors = constructed(overlap, what=what, tasks=3, side=SIDE, matrices=1)
    result = merge(vectors, settings(budget, shared=shared, max_rank=RANK))
    for _, stored in changes(vectors, result):
        assert int(torch.linalg.matrix_rank(stored.double(), rtol=1e-5)) <= RANK
    bits = settings(budget).budget.bits(result.storage.unit_bits)
    assert result.storage.excl_bits <= bits


@pytest.mark.parametrize("shared", ["mean", "subspaces"])
def test_the_other_forms_are_used_under_it(shared):
    what = {"mean": "direction", "subspaces": "spaces"}[shared]
    vectors = constructed(0.9, what=what, tasks=4, side=SIDE, matrices=1)
    result = merge(vectors, settings(0.1, max_rank=RANK, shared=shared))
    assert set(result.report.forms.values()) != {"experts"}


def test_it_is_no_bound_for_matrices_that_are_no_larger():
    vectors = constructed(0.3, tasks=3, side=SIDE, matrices=2)
    free = merge(vectors, settings(1.0)).report.relative_error
    assert merge(vectors, settings(1.0, max_rank=SIDE)).report.relative_error == free


def test_less_is_lost_than_by_a_cut_afterwards():
    vectors = constructed(0.0, tasks=3, side=SIDE, matrices=2)

    def lost(result, rank):
        total = 0.0
        for tau, stored in changes(vectors, result):
            U, S, Vh = torch.linalg.svd(stored.double())
            cut = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            total += float((tau.double() - cut).square().sum())
        return total

    before = merge(vectors, settings(0.6, max_rank=RANK, gain="none"))
    after = merge(vectors, settings(0.6, gain="none"))
    assert lost(before, RANK) < lost(after, RANK)


def test_settings_that_contradict_it_are_refused():
    with pytest.raises(SettingsError, match="vectors=expert: adapters carry no"):
        settings(1.0, max_rank=4, vectors="expert")
    with pytest.raises(SettingsError, match="allocation=uniform"):
        settings(1.0, max_rank=4, allocation="uniform")
    with pytest.raises(SettingsError, match="residual=full"):
        settings(1.0, max_rank=4, residual="full", factor_dtype="int8")
    with pytest.raises(SettingsError, match="max_rank=0"):
        settings(1.0, max_rank=0)
