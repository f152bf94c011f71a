"""Common subspaces: the table of sizes is the error of what is stored, and refinement lowers it."""

import pytest
import torch
from torch import Tensor
from tucker_models import in_common

from fusion_bench_didi.lowrank.overlap import subspace_overlap
from fusion_bench_didi.lowrank.svd import half_svd
from fusion_bench_didi.lowrank.tucker import (
    GRID,
    cores,
    optimistic_tucker,
    refine_tucker,
    tucker_bases,
)

WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0])


def test_togetherness_tells_common_directions_from_unrelated_ones():
    g = torch.Generator().manual_seed(3)
    alone = torch.randn(4, 60, 50, generator=g) * torch.arange(1, 61).rsqrt()[:, None]
    mixed = torch.stack([tau[torch.randperm(60, generator=g)] for tau in alone])

    def found(stack: Tensor) -> float:
        return subspace_overlap([half_svd(tau) for tau in stack], WEIGHTS)

    assert found(mixed) == pytest.approx(1.0, abs=0.07)
    assert found(in_common(60, 50, 5)) > 1.2
    assert found(in_common(50, 60, 5)) > 1.2
    assert found(in_common(60, 50, 5, noise=1.0)) > 1.2


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (3, 40), (40, 3)])
def test_table_is_the_dense_error_at_every_pair_of_sizes(shape):
    tau = in_common(*shape, size=2, noise=0.5)
    spaces = tucker_bases(tau, WEIGHTS)
    for i, p in enumerate(spaces.sizes_up.tolist()):
        for j, q in enumerate(spaces.sizes_down.tolist()):
            up, down = spaces.up[:, :p], spaces.down[:q]
            rest = tau - up @ (up.mT @ tau @ down.mT) @ down
            error = (WEIGHTS * rest.square().sum((1, 2))).sum()
            found = spaces.energy - float(spaces.kept[i, j])
            assert found == pytest.approx(
                float(error), rel=1e-4, abs=1e-5 * spaces.energy
            )


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_table_of_leading_directions_is_nearly_the_dense_error(shape):
    tau = in_common(*shape, size=6, noise=2.0)
    bases = [half_svd(matrix) for matrix in tau]
    spaces = tucker_bases(tau, WEIGHTS, bases=bases)
    for i, j in ((3, 3), (5, 9), (20, 30), (40, 30)):
        up, down = spaces.up[:, : i + 1], spaces.down[: j + 1]
        core = up.mT @ tau @ down.mT
        kept = float((WEIGHTS * core.square().sum((1, 2))).sum())
        assert float(spaces.kept[i, j]) == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
@pytest.mark.parametrize("noise", [0.1, 10.0])
def test_no_more_is_kept_than_singular_values_allow(shape, noise):
    """Of what is common to all the bound is close; of noise it is a bound."""
    tau, weights = in_common(*shape, noise=noise), torch.tensor([1.0, 2.0, 0.5, 1.0])
    bases = [half_svd(t, max_rank=16) for t in tau]
    found = tucker_bases(tau, weights, bases=bases, max_up=20, max_down=18)
    bound = optimistic_tucker(shape, bases, weights, max_up=20, max_down=18)
    assert bound.energy == pytest.approx(found.energy)
    assert torch.equal(bound.sizes_up, found.sizes_up)
    assert torch.equal(bound.sizes_down, found.sizes_down)
    assert (found.kept <= bound.kept + 1e-5 * found.energy).all()
    if noise < 1:
        assert float(bound.kept[3, 3]) < 1.02 * float(found.kept[3, 3])


def test_whole_sides_lose_nothing():
    tau = in_common()
    spaces = tucker_bases(tau, WEIGHTS)
    assert float(spaces.kept[-1, -1]) == pytest.approx(spaces.energy, rel=1e-5)
    core = cores(tau, spaces.up, spaces.down)
    torch.testing.assert_close(spaces.up @ core @ spaces.down, tau, atol=1e-4, rtol=0)


def test_large_sides_are_tabulated_coarsely_up_to_the_end():
    spaces = tucker_bases(in_common(2 * GRID + 3, 8), WEIGHTS)
    assert len(spaces.sizes_up) <= GRID + 1
    # more columns than the tasks have rows are none
    assert int(spaces.sizes_up[-1]) == spaces.up.shape[1] == 4 * 8


def test_refinement_never_raises_the_error_and_finds_what_is_there():
    tau = in_common(noise=0.8)
    start = tucker_bases(tau, WEIGHTS)
    up, down = start.up[:, :3], start.down[:3]

    def error(up: Tensor, down: Tensor) -> float:
        rest = tau - up @ cores(tau, up, down) @ down
        return float((WEIGHTS * rest.square().sum((1, 2))).sum())

    errors = [error(up, down)]
    for _ in range(6):
        up, down = refine_tucker(tau, WEIGHTS, up, down, sweeps=1, tolerance=0.0)
        errors.append(error(up, down))
    assert all(b <= a * (1 + 1e-5) for a, b in zip(errors, errors[1:]))
    assert errors[-1] < errors[0]
    exact = in_common(noise=0.0)
    start = tucker_bases(exact, WEIGHTS)
    assert start.energy - float(start.kept[3, 3]) < 1e-5 * start.energy


def test_a_stack_as_high_as_wide_is_refined_like_any_other():
    """Four rows of three task vectors side by side are as many columns as the matrix has rows; a row of zeros more is not."""
    tau, weights = in_common(12, 20, tasks=3, noise=2.0), torch.ones(3)
    errors = []
    for vectors in (tau, torch.cat([tau, torch.zeros(3, 1, 20)], 1)):
        start = tucker_bases(vectors, weights)
        sides = start.up[:, :6], start.down[:4]
        up, down = refine_tucker(vectors, weights, *sides, sweeps=9, tolerance=0.0)
        kept = [(up.mT @ v @ down.mT).square().sum() for v in vectors]
        errors.append(start.energy - float(sum(kept)))
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
