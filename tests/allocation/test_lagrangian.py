"""Choice among storage forms by their rate-distortion curves."""

import pytest
import torch
from random_tasks import random_tasks
from torch import Tensor

from fusion_bench_didi.allocation.experts_curve import ExpertsCurve
from fusion_bench_didi.allocation.lagrangian import choose
from fusion_bench_didi.allocation.spectra import Rate
from fusion_bench_didi.lowrank.svd import spectrum


def candidates_of(tau: Tensor, ranks=(0, 1, 2, 4), weights: Tensor | None = None):
    m, n = tau.shape[1:]
    weights = torch.ones(len(tau)) if weights is None else weights
    row = []
    for k in ranks:
        rest = tau - spectrum(tau.mean(0)).cut(k).dense()
        sigma = torch.stack([spectrum(r).S for r in rest])
        rate = Rate(per_rank=32 * (m + n), dense=32 * m * n)
        nothing = torch.zeros(len(tau))
        row.append(ExpertsCurve(k, rate, weights, sigma, nothing, min(m, n)))
    return row


def test_sharing_is_chosen_only_where_it_pays():
    g = torch.Generator().manual_seed(8)
    common = 5 * torch.randn(20, 2, generator=g) @ torch.randn(2, 16, generator=g)
    alike = common + 0.1 * torch.randn(4, 20, 16, generator=g)
    alone = 5 * torch.stack(
        [
            torch.randn(20, 2, generator=g) @ torch.randn(2, 16, generator=g)
            for _ in range(4)
        ]
    )
    options = [candidates_of(alike), candidates_of(alone)]
    budget = 16 * options[0][0].rate.per_rank
    picks, _ = choose(options, budget)
    assert options[0][picks[0]].shared_rank == 2
    assert options[1][picks[1]].shared_rank == 0


def test_what_is_shared_is_not_bought_beyond_the_budget():
    """It gains more per bit than any expert where many tasks are nearly alike, and leaves experts nothing to gain."""
    tau = torch.randn(1, 30, 2, generator=torch.Generator().manual_seed(0))
    tau = tau.expand(6, 30, 2) + 1e-3 * random_tasks(30, 2, tasks=6)
    row = [candidate.curve for candidate in candidates_of(tau, ranks=(0, 2))]
    picks, multiplier = choose([row], row[1].shared - 1)
    assert row[picks[0]].at(multiplier)[1] < row[1].shared
    assert choose([row], row[1].shared + 1)[0] == [1]


def test_curve_of_a_candidate_is_the_error_of_its_experts():
    tau = random_tasks(20, 9)
    weights = torch.tensor([0.5, 1.0, 2.0])
    curve = candidates_of(tau, weights=weights)[1].curve
    error, bits = curve.error, curve.bits
    rest = tau - spectrum(tau.mean(0)).cut(1).dense()
    for t in range(3):
        for k in (0, 1, 3):
            left = (rest[t] - spectrum(rest[t]).cut(k).dense()).square().sum()
            assert float(error[t, k]) == pytest.approx(float(weights[t] * left), 1e-4)
            assert int(bits[k]) == k * 32 * 29
    assert bits[-1] == 32 * 180 and bool((error[:, -1] == 0).all())
