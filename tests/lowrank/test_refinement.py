"""Refinement of factors: alternating least squares and Adam never end above their start."""

import pytest
import torch
from random_tasks import SHAPES, random_tasks
from torch import Tensor

from fusion_bench_didi.lowrank.decomposition import decompose
from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.lowrank.refinement import (
    FactorSet,
    RefinementSettings,
    _factored_gradient,
    refine,
)
from fusion_bench_didi.lowrank.static_merge import shared_matrix
from fusion_bench_didi.lowrank.subspace_iteration import Subspace
from fusion_bench_didi.lowrank.svd import spectrum


def truncated(tau: Tensor, ranks: list[int | None]) -> FactorSet:
    """Truncated SVDs; None is a dense expert."""
    shared = shared_matrix(tau)
    parts = decompose(tau, shared, coupled=False)
    return FactorSet(
        parts.shared.cut(ranks[0]),
        tuple(
            None if k is None else s.cut(k) for s, k in zip(parts.experts, ranks[1:])
        ),
    )


RANKS = [[3, 2, 2, 2], [0, 1, 4, 2], [3, 0, 0, 0], [2, 3, None, 0], [1, None, 2, 1]]


WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


def loss(modules: FactorSet, tau: Tensor) -> float:
    return float((WEIGHTS * modules.errors(tau)).sum())


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_alternating_never_raises_the_loss(shape, ranks):
    tau = random_tasks(*shape)
    start = truncated(tau, ranks)
    losses = [loss(start, tau)]
    for sweeps in range(1, 9):
        settings = RefinementSettings(sweeps=sweeps, tolerance=0.0)
        done = refine(start, tau, weights=WEIGHTS, how="alternating", settings=settings)
        losses.append(loss(done, tau))
    assert all(b <= a * (1 + 1e-5) for a, b in zip(losses, losses[1:])), losses
    assert shapes(done) == shapes(start)
    if ranks == RANKS[0]:
        assert losses[-1] < 0.999 * losses[0], "nothing was refined"


def shapes(modules: FactorSet) -> list:
    parts = (modules.shared, *modules.experts)
    return [p and (tuple(p.up.shape), tuple(p.down.shape)) for p in parts]


@pytest.mark.parametrize("lr", [1e-2, 30.0])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_adam_never_ends_above_its_start(ranks, lr):
    tau = random_tasks(20, 9)
    start = truncated(tau, ranks)
    settings = RefinementSettings(steps=40, lr=lr)
    done = refine(start, tau, weights=WEIGHTS, how="adam", settings=settings)
    assert loss(done, tau) <= loss(start, tau)
    assert shapes(done) == shapes(start)
    if ranks == RANKS[0] and lr < 1:
        assert loss(done, tau) < 0.999 * loss(start, tau), "nothing was refined"


@pytest.mark.parametrize("ranks", [[8, 4, 4, 4, 4], [3, 8, 2, 5, 0]], ids=str)
def test_alternating_reaches_the_loss_of_three_hundred_adam_steps(ranks):
    tau, weights = random_tasks(48, 40, decay=0.95, tasks=4), torch.ones(4)
    start = truncated(tau, ranks)
    losses = {
        how: float(refine(start, tau, weights=weights, how=how).errors(tau).sum())
        for how in ("alternating", "adam")
    }
    assert losses["alternating"] <= 1.001 * losses["adam"], losses


def test_a_followed_subspace_converges_even_where_columns_are_dependent():
    g = torch.Generator().manual_seed(12)
    thin = torch.randn(30, 3, generator=g) @ torch.randn(3, 24, generator=g)
    for matrix in (thin, thin.mT, torch.randn(30, 24, generator=g)):
        shape = matrix.shape
        start = LowRankFactors(torch.zeros(shape[0], 5), torch.zeros(5, shape[1]))
        followed, kept = Subspace(start, following=1.5), [0.0]
        for _ in range(40):
            factors, energy = followed.step(matrix)
            kept.append(energy)
            assert factors.rank == 5
        error = float((matrix - factors.dense()).square().sum())
        whole = float(matrix.square().sum())
        assert all(b >= a - 1e-5 * whole for a, b in zip(kept, kept[1:]))
        assert error == pytest.approx(whole - kept[-1], abs=1e-5 * whole)
        best = spectrum(matrix, max_rank=5).tail_energy
        assert error == pytest.approx(best, rel=1e-2, abs=1e-5 * whole)


def test_a_followed_subspace_of_nothing_is_nothing():
    nothing = LowRankFactors(torch.zeros(9, 2), torch.zeros(2, 7))
    followed = Subspace(nothing, following=1.5)
    for _ in range(2):
        factors, kept = followed.step(torch.zeros(9, 7))
        assert not factors.dense().any() and kept < 1e-30


def test_factored_gradient_equals_autograd():
    g = torch.Generator().manual_seed(7)
    tau = torch.randn(3, 11, 8, generator=g)
    w = torch.tensor([0.2, 0.5, 0.3])
    sizes = [(11, 2), (2, 8), (3, 11, 4), (3, 4, 8)]
    parameters = [torch.randn(s, generator=g, requires_grad=True) for s in sizes]
    b0, a0, b, a = parameters
    (w * (b0 @ a0 + b @ a - tau).square().sum((1, 2))).sum().backward()
    detached = [p.detach() for p in parameters]
    for found, p in zip(_factored_gradient(detached, tau, w), parameters):
        torch.testing.assert_close(found, p.grad, atol=1e-4, rtol=1e-4)


def test_no_refinement_returns_the_truncated_factors():
    tau = random_tasks(12, 12)
    start = truncated(tau, RANKS[0])
    assert refine(start, tau, weights=WEIGHTS, how="none") is start
    with pytest.raises(ValueError, match="refinement='lbfgs'; choose alternating"):
        refine(start, tau, weights=WEIGHTS, how="lbfgs")
