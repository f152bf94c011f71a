"""Spectra and shared matrices against plain dense arithmetic."""

import pytest
import torch
from random_tasks import SHAPES

from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.lowrank.static_merge import shared_matrix
from fusion_bench_didi.lowrank.subspace_iteration import subspace_step
from fusion_bench_didi.lowrank.svd import spectrum


@pytest.mark.parametrize("shape", [*SHAPES, (1, 5), (7, 1), (2, 40)])
def test_spectrum_is_the_singular_value_decomposition(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = spectrum(matrix)
    torch.testing.assert_close(whole.head(), matrix, atol=1e-5, rtol=0)
    eye = torch.eye(min(shape))
    torch.testing.assert_close(whole.U.mT @ whole.U, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.Vh @ whole.Vh.mT, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.S, torch.linalg.svdvals(matrix))
    assert whole.tail_energy == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_cut_spectrum_carries_the_energy_of_its_tail(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    cut = spectrum(matrix, max_rank=3)
    rest = (matrix - cut.head()).square().sum()
    assert cut.S.shape == (3,)
    assert cut.tail_energy == pytest.approx(float(rest), rel=1e-4)
    assert cut.energy == pytest.approx(float(matrix.square().sum()), rel=1e-5)
    torch.testing.assert_close(
        cut.cut(2).dense(), (cut.U[:, :2] * cut.S[:2]) @ cut.Vh[:2]
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 2])
def test_spectrum_of_a_matrix_of_low_rank_is_finite_and_exact(shape, rank):
    g = torch.Generator().manual_seed(3)
    m, n = shape
    matrix = torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
    found = spectrum(matrix)
    torch.testing.assert_close(found.head(), matrix, atol=1e-5, rtol=0)
    assert bool((found.S[rank:] < 1e-4).all())


def test_signs_of_singular_vectors_do_not_depend_on_the_sign_of_a_driver():
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(4))
    U = spectrum(matrix).U
    assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())


def test_subspace_steps_never_raise_the_error():
    g = torch.Generator().manual_seed(5)
    matrix = torch.randn(14, 10, generator=g)
    factors = LowRankFactors(
        torch.randn(14, 4, generator=g), torch.randn(4, 10, generator=g)
    )
    errors = [float((matrix - factors.dense()).square().sum())]
    for _ in range(60):
        factors = subspace_step(matrix, factors)
        errors.append(float((matrix - factors.dense()).square().sum()))
    assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:]))
    assert errors[-1] == pytest.approx(spectrum(matrix, max_rank=4).tail_energy, 1e-2)


def test_factors_of_different_rank_are_refused():
    with pytest.raises(ValueError, match=r"up \(4, 2\) and down \(3, 5\) differ"):
        LowRankFactors(torch.zeros(4, 2), torch.zeros(3, 5))


def test_shared_matrix_by_hand():
    tau = torch.tensor([[[4.0, -2.0, 0.1]], [[2.0, 1.0, -3.0]]])
    assert shared_matrix(tau).tolist() == [[3.0, -0.5, pytest.approx(-1.45)]]
    assert shared_matrix(tau, weights=torch.tensor([1.0, 0.0])).equal(tau[0])
    arithmetic = shared_matrix(tau, how="task_arithmetic", scale=0.5)
    assert arithmetic.equal(0.5 * (tau[0] + tau[1]))
    # two of three entries stay: [4, -2, 0] and [2, 0, -3]; no signs disagree
    assert shared_matrix(tau, how="ties", keep=2 / 3).tolist() == [[3.0, -2.0, -3.0]]
    assert not shared_matrix(tau, how="none").any()
    with pytest.raises(ValueError, match="'avg' is not a static merge"):
        shared_matrix(tau, how="avg")


def test_ties_averages_only_entries_of_the_elected_sign():
    tau = torch.tensor([[[5.0]], [[-2.0]], [[1.0]]])
    assert shared_matrix(tau, how="ties", keep=1.0).item() == 3.0
