"""The range finder and halves of decompositions find what whole decompositions find."""

import pytest
import torch

from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.lowrank import svd
from fusion_bench_didi.lowrank.decomposition import decompose, half_of
from fusion_bench_didi.lowrank.eigen import eigen_of
from fusion_bench_didi.lowrank.overlap import mean_overlap
from fusion_bench_didi.lowrank.svd import (
    HalfSVD,
    half_svd,
    singular_values,
    sketched,
    spectrum,
)


def decaying(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Singular values falling like i^(-1/2): hard for a range finder."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, n, generator=g)
        * torch.arange(1, m + 1).rsqrt()[torch.randperm(m, generator=g), None]
    )


def check_cuts(matrix: torch.Tensor, found: HalfSVD, ranks: tuple[int, ...]) -> None:
    """That errors at ranks are within two percent of the least possible."""
    values = torch.linalg.svdvals(matrix)
    for k in ranks:
        least = float(values[k:].square().sum())
        error = float((matrix - found.factors(matrix, k).dense()).square().sum())
        assert least * (1 - 1e-4) <= error <= 1.02 * least


@pytest.mark.parametrize("shape", [(300, 300), (700, 260), (260, 700)])
def test_range_finder_is_within_two_percent_of_the_least_error(shape):
    matrix = decaying(*shape)
    rank = 24
    assert sketched(shape, rank)
    found = half_svd(matrix, max_rank=rank)
    check_cuts(matrix, found, (6, 12, 24))
    rest = float((matrix - found.factors(matrix, rank).dense()).square().sum())
    assert found.tail_energy == pytest.approx(rest, rel=1e-3)
    torch.testing.assert_close(
        singular_values(matrix, max_rank=rank), found.S, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("way", [svd._direct, svd._within_gram])
@pytest.mark.parametrize("shape", [(300, 300), (900, 260), (260, 900)])
def test_every_way_to_search_finds_the_same_directions(shape, way, monkeypatch):
    matrix, rank = decaying(*shape), 40
    monkeypatch.setattr(svd, "_cheapest", lambda *_: way)
    found = half_svd(matrix, max_rank=rank)
    torch.testing.assert_close(
        found.vectors.mT @ found.vectors, torch.eye(rank), atol=1e-4, rtol=0
    )
    check_cuts(matrix, found, (10, 20, 40))


@pytest.mark.parametrize("exponent", [-53, -37, 32, 40])
@pytest.mark.parametrize("shape", [(1100, 256), (400, 900)])
def test_directions_within_a_gram_matrix_are_those_of_any_size(
    shape, exponent, monkeypatch
):
    """Of entries from 1e-16 to 1e12, fourth powers of whose singular values no float32 holds."""
    monkeypatch.setattr(svd, "_cheapest", lambda *_: svd._within_gram)
    matrix, size = decaying(*shape), 2.0**exponent
    usual, found = (half_svd(x, max_rank=16) for x in (matrix, size * matrix))
    assert found.vectors.equal(usual.vectors)
    assert found.S.equal(size * usual.S)
    tail = size**2 * usual.tail_energy
    assert found.tail_energy == pytest.approx(tail, rel=1e-4)


def test_long_matrices_are_searched_within_their_gram_matrix():
    assert svd._cheapest((1024, 1024), 20, "cpu") is svd._direct
    assert svd._cheapest((1024, 4096), 250, "cpu") is svd._within_gram
    assert svd._cheapest((1024, 4096), 900, "cpu") is svd._gram


def test_gram_matrix_in_strips_is_the_whole_product():
    for shape in ((50, 7), (20, 300), (9, 1)):
        a = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(svd._gram_matrix(a), a.mT.double() @ a.double())


def test_exact_means_exact_whatever_the_size():
    matrix = decaying(300, 280)
    values = torch.linalg.svdvals(matrix)[:8]
    found = spectrum(matrix, max_rank=8, exact=True)
    torch.testing.assert_close(found.S, values, rtol=1e-5, atol=0)


def test_range_finder_is_for_few_directions_of_large_matrices():
    assert not sketched((64, 64), 2)
    assert not sketched((768, 768), 700)
    assert sketched((768, 768), 60)


def test_half_a_decomposition_is_enough_to_cut(monkeypatch):
    for shape in ((20, 12), (12, 20)):
        matrix = decaying(*shape)
        half, whole = half_svd(matrix), spectrum(matrix)
        for k in (0, 3, 12):
            torch.testing.assert_close(
                half.factors(matrix, k).dense(),
                whole.cut(k).dense(),
                atol=1e-5,
                rtol=1e-4,
            )


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (12, 12)])
def test_half_of_a_coupled_decomposition_cuts_like_the_whole(shape):
    vectors = [decaying(*shape, seed) for seed in range(3)]
    whole = decompose(vectors, sum(vectors) / 3, max_rank=5)
    half = half_of(whole)
    parts = zip((half.shared, *half.experts), (whole.shared, *whole.experts))
    residuals = [sum(vectors) / 3, *(v - sum(vectors) / 3 for v in vectors)]
    for (basis, spectrum), matrix in zip(parts, residuals):
        torch.testing.assert_close(
            basis.factors(matrix, 5).dense(),
            spectrum.cut(5).dense(),
            atol=1e-5,
            rtol=1e-4,
        )


@pytest.mark.parametrize("how", ["raises", "gives no numbers"])
def test_eigensolver_that_fails_in_float32_is_tried_in_float64(
    monkeypatch, caplog, how
):
    real = torch.linalg.eigh

    def failing(gram):
        values, vectors = real(gram)
        if gram.dtype == torch.float32:
            if how == "raises":
                raise torch.linalg.LinAlgError("did not converge")
            values = torch.full_like(values, torch.nan)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(svd, "DOUBLE_SIDE", 0)
    matrix = decaying(9, 7)
    torch.testing.assert_close(
        spectrum(matrix, name="layer.weight").head(), matrix, atol=1e-4, rtol=1e-4
    )
    assert "layer.weight" in caplog.text


@pytest.mark.parametrize("name", ["", "layer.weight"])
def test_a_matrix_whose_squares_leave_float32_is_named(name):
    with pytest.raises(DiDiError, match=f"no decomposition of {name or 'a matrix'}"):
        eigen_of(torch.diag(torch.tensor([1.0, torch.inf, 2.0])), name)


@pytest.mark.parametrize("rank", [1, 9])
def test_tasks_that_change_nothing_have_nothing_in_common(rank):
    assert mean_overlap(torch.zeros(9), torch.zeros(3, 9), torch.ones(3), rank) == 0


def test_sharing_is_one_for_unrelated_tasks_and_t_for_equal_ones():
    g = torch.Generator().manual_seed(0)
    own = torch.randn(6, 200, 150, generator=g)
    weights = torch.ones(6)

    def found(tau):
        sigma = torch.stack([torch.linalg.svdvals(t) for t in tau])
        return mean_overlap(torch.linalg.svdvals(tau.mean(0)), sigma, weights, 150)

    assert found(own) == pytest.approx(1.0, abs=0.1)
    assert found(own[:1].expand(6, -1, -1)) == pytest.approx(6.0, rel=1e-4)
