"""Task vectors that are given as factors: the same numbers as from the entries, and no product of full size on the way."""

import pytest
import torch
from torch import Tensor

from fusion_bench_didi.allocation.learned import truncation_error
from fusion_bench_didi.allocation.spectra import Rate, spectra_of
from fusion_bench_didi.deltas.precision import precisions
from fusion_bench_didi.lowrank.decomposition import decompose, half_decompose
from fusion_bench_didi.lowrank.factored import (
    JointBasis,
    inner,
    product_svd,
    subtracting,
)
from fusion_bench_didi.lowrank.factors import LowRankFactors, energy_of
from fusion_bench_didi.lowrank.refinement import FactorSet, RefinementSettings, refine
from fusion_bench_didi.lowrank.static_merge import shared_matrix
from fusion_bench_didi.lowrank.svd import half_svd, singular_values, spectrum
from fusion_bench_didi.lowrank.tucker import refine_tucker, tucker_bases
from fusion_bench_didi.merging.forms.tucker import encode_cores

SHAPES = [(20, 12), (12, 20), (14, 14)]


def adapters(m: int, n: int, ranks=(2, 3, 0, 1), seed: int = 0) -> list[LowRankFactors]:
    g = torch.Generator().manual_seed(seed)
    return [
        LowRankFactors(
            torch.randn(m, r, generator=g), 0.1 * torch.randn(r, n, generator=g)
        )
        for r in ranks
    ]


def entries(vectors: list[LowRankFactors]) -> Tensor:
    return torch.stack([v.dense() for v in vectors])


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_are_those_of_the_matrix(shape):
    a, b, *_ = adapters(*shape)
    A, B = a.dense(), b.dense()
    m, n = shape
    assert a.shape == A.shape and a.dtype == A.dtype and a.device == A.device
    pairs = [
        (a.mT.dense(), A.mT),
        (a @ torch.ones(n, 2), A @ torch.ones(n, 2)),
        (torch.ones(2, m) @ a, torch.ones(2, m) @ A),
        ((a + b).dense(), A + B),
        ((a - b).dense(), A - B),
        ((a * -3.0).dense(), -3 * A),
        (a - B, A - B),
        (a + B, A + B),
        (A - b, A - B),
        (inner(a, b), (A * B).sum()),
        (inner(A, b), (A * B).sum()),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
    assert (a - b).rank == a.rank + b.rank
    for factors, matrix in ((a, A), (a - b, A - B)):
        torch.testing.assert_close(energy_of(factors), matrix.double().square().sum())


def test_energy_of_what_cancels_is_that_of_rounding():
    a, *_ = adapters(50, 40)
    assert float(energy_of(a - a)) <= 1e-14 * float(energy_of(a))
    zero = LowRankFactors(torch.zeros(5, 2), torch.randn(2, 4))
    assert float(energy_of(zero)) == 0.0  # an adapter that was never trained


def test_a_part_is_subtracted_in_the_form_of_the_task_vector():
    a, b, *_ = adapters(20, 12)
    less = subtracting(b)
    assert isinstance(less(a), LowRankFactors)
    torch.testing.assert_close(less(a.dense()), a.dense() - b.dense())
    assert subtracting(None)(a) is a
    torch.testing.assert_close(subtracting(b.dense())(a), a.dense() - b.dense())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_product_is_decomposed_like_its_entries(shape, rank):
    (a,) = adapters(*shape, ranks=(5,))
    of_factors, of_entries = half_svd(a, max_rank=rank), half_svd(
        a.dense(), max_rank=rank
    )
    torch.testing.assert_close(of_factors.S, of_entries.S, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(singular_values(a, max_rank=rank), of_factors.S)
    for k in range(min(rank, 5) + 1):
        torch.testing.assert_close(
            of_factors.factors(a, k).dense(), of_entries.factors(a.dense(), k).dense()
        )
    whole = spectrum(a, max_rank=rank)
    torch.testing.assert_close(
        whole.head(), spectrum(a.dense(), max_rank=rank).head(), atol=1e-6, rtol=1e-5
    )
    exact = a.up.double() @ a.down.double()
    rest = float(torch.linalg.svdvals(exact)[rank:].square().sum())
    assert whole.tail_energy == of_factors.tail_energy == pytest.approx(rest, abs=1e-9)


def test_rank_is_that_of_the_matrix_and_not_of_the_factors():
    a, b, *_ = adapters(40, 30)
    for product, rank in ((a, 2), (a - b, 5), (a - a, 0), (a + a * 0.3 - b, 5)):
        assert len(product_svd(product)[1]) == rank
        assert int((half_svd(product).S > 0).sum()) == rank
        assert half_svd(product).tail_energy == 0.0


def test_small_directions_are_kept():
    """Factors of very different size on the two sides, and singular values over five decades."""
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(k, 6, generator=g)).Q for k in (60, 50))
    sizes = torch.logspace(0, -5, 6)
    product = LowRankFactors(1e-3 * left * sizes, 1e3 * right.mT)
    torch.testing.assert_close(half_svd(product).S[:6], sizes, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["mean", "task_arithmetic", "ties", "none"])
def test_shared_matrix_of_adapters_and_of_a_mixed_pool(shape, how):
    vectors = adapters(*shape)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    options = {"how": how, "weights": weights, "keep": 0.3}
    expected = shared_matrix(entries(vectors), **options)
    found = shared_matrix(vectors, **options)
    if how != "ties":
        assert found.rank <= 6
        found = found.dense()
    torch.testing.assert_close(found, expected)
    mixed = [vectors[0], vectors[1].dense(), *vectors[2:]]
    found = shared_matrix(mixed, **options)
    if how == "none":
        found = found.dense()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared_rank", [None, 0, 2])
def test_halves_of_adapters_are_those_of_their_entries(shape, shared_rank):
    vectors = adapters(*shape)
    of = []
    for given in (vectors, entries(vectors), [vectors[0].dense(), *vectors[1:]]):
        of.append(
            half_decompose(
                given, shared_matrix(given), shared_rank=shared_rank, max_rank=6
            )
        )
    for other in of[1:]:
        parts = zip((of[0].shared, *of[0].experts), (other.shared, *other.experts))
        for a, b in parts:
            torch.testing.assert_close(a.S, b.S, atol=2e-4, rtol=1e-5)
            assert a.tail_energy == pytest.approx(b.tail_energy, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_coupling_of_adapters_is_that_of_their_entries(shape):
    """Tested on the quadratic form, which does not depend on the choice of vectors."""
    vectors = adapters(*shape, ranks=(2, 3, 1))
    weights, rate = torch.ones(3), Rate(32 * sum(shape), 32 * shape[0] * shape[1])
    rows = []
    for given in (vectors, entries(vectors)):
        parts = decompose(given, shared_matrix(given), max_rank=5)
        rows.append(spectra_of("w", parts, weights=weights, rate=rate, shape=shape))
    for ranks in ([0, 0, 0, 0], [3, 1, 2, 0], [1, 3, 3, 3], [5, 4, 2, 1]):
        k = torch.tensor(ranks)
        torch.testing.assert_close(
            truncation_error(rows[0], k),
            truncation_error(rows[1], k),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("how", ["alternating", "adam"])
@pytest.mark.parametrize("shape", SHAPES)
def test_refinement_in_the_frame_reaches_what_it_reaches_outside(shape, how):
    vectors = adapters(*shape, ranks=(3, 3, 3))
    weights = torch.tensor([1.0, 2.0, 0.5])
    shared = shared_matrix(vectors, weights=weights)
    first = half_svd(shared).factors(shared, 2)
    left = subtracting(first)
    experts = tuple(half_svd(left(v)).factors(left(v), 2) for v in vectors)
    start = FactorSet(first, experts)
    settings = RefinementSettings(sweeps=200, tolerance=1e-9, steps=600)
    options = {"weights": weights, "how": how, "settings": settings}

    def loss(modules: FactorSet) -> float:
        return float(weights @ modules.errors(entries(vectors)))

    inside = refine(start, vectors, **options)
    outside = refine(start, entries(vectors), **options)
    mixed = refine(start, [vectors[0].dense(), *vectors[1:]], **options)
    assert loss(inside) < 0.95 * loss(start)
    assert loss(inside) == pytest.approx(loss(outside), rel=0.02)
    assert loss(mixed) == pytest.approx(loss(outside), rel=1e-3)
    assert [e.rank for e in inside.experts] == [2, 2, 2]


def test_frame_keeps_norms_and_products():
    vectors = adapters(60, 40)
    frame = JointBasis.around(vectors)
    cores = [frame.inside(v) for v in vectors]
    assert cores[0].shape == (6, 6)
    for a, core_a in zip(vectors, cores):
        torch.testing.assert_close(frame.outside(core_a).dense(), a.dense())
        for b, core_b in zip(vectors, cores):
            torch.testing.assert_close(inner(core_a, core_b), inner(a, b))


@pytest.mark.parametrize("name", ["float32", "int8", "int4"])
@pytest.mark.parametrize("sizes", [(3, 4), (6, 2), (1, 1)])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_common_subspaces_of_adapters_are_those_of_their_entries(shape, sizes, name):
    vectors, weights = adapters(*shape), torch.tensor([1.0, 2.0, 0.5, 1.0])
    precision, (p, q) = precisions(name, torch.float32)[0], sizes
    errors = []
    for given in (vectors, entries(vectors)):
        spaces = tucker_bases(given, weights, max_up=8, max_down=8)
        sides = spaces.up[:, :p], spaces.down[:q]
        sides = refine_tucker(given, weights, *sides, sweeps=50, tolerance=1e-9)
        _, experts, lost = encode_cores(*sides, given, shape=shape, precision=precision)
        assert experts[2] is None  # the task that changes nothing
        errors.append(lost)
    scale = float(energy_of(vectors[1]))
    torch.testing.assert_close(*errors, rtol=0.02, atol=1e-3 * scale)
