"""The mathematics against plain dense arithmetic: spectra, the quadratic form, ranks, refinement (laws 2, 3, 4)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusion_bench_didi.allocation.experts_curve import ExpertsCurve
from fusion_bench_didi.allocation.lagrangian import choose
from fusion_bench_didi.allocation.learned import (
    LearningSettings,
    _Group,
    gate,
    hard_gate,
    learn_ranks,
    truncation_error,
)
from fusion_bench_didi.allocation.spectra import (
    MatrixSpectra,
    Rate,
    spectra_of,
    total_cost,
)
from fusion_bench_didi.allocation.water_filling import greedy, uniform
from fusion_bench_didi.lowrank.decomposition import decompose
from fusion_bench_didi.lowrank.factors import LowRankFactors, full_rank
from fusion_bench_didi.lowrank.refinement import (
    FactorSet,
    RefinementSettings,
    _factored_gradient,
    refine,
)
from fusion_bench_didi.lowrank.static_merge import shared_matrix
from fusion_bench_didi.lowrank.subspace_iteration import (
    Subspace,
    subspace_step,
)
from fusion_bench_didi.lowrank.svd import spectrum
from fusion_bench_didi.quantization import rounding as quantisation
from fusion_bench_didi.quantization.codes import ends
from fusion_bench_didi.quantization.rounding import round_factors

SHAPES = [(12, 12), (20, 9), (6, 30)]


def random_tasks(
    m: int, n: int, *, tasks: int = 3, decay: float = 0.8, seed: int = 0
) -> Tensor:
    """(T, m, n) with decaying spectra around a common part."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    sizes = decay ** torch.arange(k)

    def one() -> Tensor:
        left = torch.linalg.qr(torch.randn(m, k, generator=g)).Q
        right = torch.linalg.qr(torch.randn(n, k, generator=g)).Q
        return (left * sizes) @ right.mT

    common = one()
    return torch.stack([0.7 * common + one() for _ in range(tasks)])


def table_row(
    tau: Tensor,
    *,
    name: str = "w",
    max_rank: int | None = None,
    weights: Tensor | None = None,
    how: str = "mean",
) -> MatrixSpectra:
    m, n = tau.shape[1:]
    return spectra_of(
        name,
        decompose(tau, shared_matrix(tau, how=how), max_rank=max_rank),
        weights=torch.ones(len(tau)) if weights is None else weights,
        rate=Rate(per_rank=32 * (m + n), dense=32 * m * n),
        shape=(m, n),
        shared_rank=0 if how == "none" else None,
    )


# --- spectra ------------------------------------------------------------------


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


def test_rank_cap_is_the_last_rank_cheaper_than_dense():
    for m, n in [(2, 2), (3, 3), (12, 12), (20, 9), (6, 30), (1, 7)]:
        cap = Rate(per_rank=m + n, dense=m * n).cap
        assert cap * (m + n) < m * n or cap == 0
        assert (cap + 1) * (m + n) >= m * n


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


# --- shared matrix, Eq. 2 -----------------------------------------------------


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


# --- the quadratic form, law 2 ------------------------------------------------


def dense_error(tau: Tensor, shared: Tensor, ranks: Tensor) -> Tensor:
    """(T,) errors by reconstruction."""
    full = full_rank(*shared.shape)

    def cut(matrix: Tensor, rank: int) -> Tensor:
        if rank >= full:
            return matrix
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return (U[:, :rank] * S[:rank]) @ Vh[:rank]

    common = cut(shared, int(ranks[0]))
    kept = [common + cut(t - shared, int(k)) for t, k in zip(tau, ranks[1:])]
    return (tau - torch.stack(kept)).square().sum((1, 2)).double()


@pytest.mark.parametrize("how", ["mean", "task_arithmetic", "ties", "none"])
@pytest.mark.parametrize("max_rank", [None, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_quadratic_form_equals_dense_loss(shape, max_rank, how):
    tau = random_tasks(*shape)
    shared = shared_matrix(tau, how=how)
    row = table_row(tau, max_rank=max_rank, how=how)
    known, full = row.sigma.shape[1], full_rank(*shape)
    g = torch.Generator().manual_seed(6)
    choices = torch.tensor([*range(known + 1), full])
    for _ in range(12):
        pick = torch.randint(len(choices), (4,), generator=g)
        ranks = choices[pick]
        expected = dense_error(tau, shared, ranks)
        found = truncation_error(row, ranks).double()
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("max_rank", [None, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_quadratic_form_equals_that_of_the_dense_loss(shape, max_rank):
    tau = random_tasks(*shape)
    weights = torch.tensor([0.5, 1.0, 2.0])
    shared = shared_matrix(tau)
    row = table_row(tau, max_rank=max_rank, weights=weights)
    parts = decompose(tau, shared, max_rank=max_rank)
    q = row.sigma.shape[1]
    k = torch.tensor([[1.7, 0.2, 2.5, 3.4]], requires_grad=True)
    by_form = _Group.of([row]).error(k, beta=0.6)
    (gradient,) = torch.autograd.grad(by_form, k)

    kept = gate(k[0], q, beta=0.6)  # (T + 1, q)
    spectra = (parts.shared, *parts.experts)
    soft = [(s.U * (w * s.S)) @ s.Vh for s, w in zip(spectra, kept)]
    dense = sum(
        w * (t - soft[0] - e).square().sum() for w, t, e in zip(weights, tau, soft[1:])
    )
    (expected,) = torch.autograd.grad(dense, k)
    torch.testing.assert_close(by_form, dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_reduced_coupling_is_off_by_its_rounding_and_no_more(shape):
    row = table_row(random_tasks(*shape))
    reduced = replace(row, coupling=row.coupling.reduced())
    assert reduced.coupling.head.dtype == torch.bfloat16
    energy = row.sigma.square().sum(1)
    for ranks in torch.tensor([[0, 0, 0, 0], [1, 2, 0, 1], [2, 1, 2, 0]]):
        found = truncation_error(reduced, ranks) - truncation_error(row, ranks)
        assert bool((found.abs() <= 0.01 * energy.max()).all())


def test_smooth_truncation_becomes_the_hard_one():
    k = torch.tensor([0.0, 1.0, 3.0, 5.0])
    torch.testing.assert_close(gate(k, 5, beta=50.0), hard_gate(k, 5))
    assert gate(torch.tensor(2.5), 5, beta=1.0)[2] == 0.5


# --- ranks, law 3 -------------------------------------------------------------


def mixed_table(decay: float = 0.8, *, how: str = "mean", seed: int = 0, **kwargs):
    """Rows of different shapes and sizes of the change."""
    rows = []
    for i, shape in enumerate([*SHAPES, (12, 12)]):
        tau = (1 + i) * random_tasks(*shape, decay=decay, seed=seed + i)
        rows.append(table_row(tau, name=f"w{i}", how=how, **kwargs))
    return rows


def allocate(how: str, table, budget: int):
    if how == "learned":
        start = greedy(table, budget)
        return learn_ranks(
            table, budget, start=start, settings=LearningSettings(steps=60)
        )
    return {"greedy": greedy, "uniform": uniform}[how](table, budget)


@pytest.mark.parametrize("decay", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 0.37, 0.9, 1.7, 3.9])
@pytest.mark.parametrize("allocation", ["learned", "greedy", "uniform"])
def test_budget_is_kept_and_used_up_to_one_rank(allocation, share, decay):
    table = mixed_table(decay)
    budget = int(share * sum(row.rate.dense for row in table))
    ranks = allocate(allocation, table, budget)
    rest = budget - total_cost(table, ranks)
    assert 0 <= rest
    for row, k in zip(table, ranks):
        between = (k > row.cap) & (k < row.full)
        assert not between.any(), "a rank dearer than the dense form"
    if not all(bool((k >= row.full).all()) for row, k in zip(table, ranks)):
        assert rest < max(row.rate.per_rank for row in table)


@pytest.mark.parametrize("allocation", ["learned", "greedy", "uniform"])
def test_more_than_enough_budget_makes_everything_exact(allocation):
    table = mixed_table()
    ranks = allocate(allocation, table, 2**62)
    lost = [truncation_error(row, k).max() for row, k in zip(table, ranks)]
    assert float(max(lost)) < 1e-6


def test_greedy_keeps_the_singular_values_worth_most():
    weights = torch.tensor([1.0, 4.0, 0.5])
    table = [
        table_row(random_tasks(20, 20, seed=s), name=f"w{s}", weights=weights)
        for s in range(3)
    ]
    count = 17
    ranks = greedy(table, count * table[0].rate.per_rank)
    worth = [row.module_weights[:, None] * row.sigma.square() for row in table]
    best = torch.cat([w.flatten() for w in worth]).topk(count).values.sum()
    kept = sum(w[j, : int(k[j])].sum() for w, k in zip(worth, ranks) for j in range(4))
    assert float(kept) == pytest.approx(float(best), rel=1e-6)


def objective(table, ranks) -> float:
    return sum(
        float((row.weights * truncation_error(row, k)).sum())
        for row, k in zip(table, ranks)
    )


@pytest.fixture(scope="module")
def oracle_table() -> list[MatrixSpectra]:
    """Large enough that one rank is a small part of the budget."""
    rows = []
    for i, shape in enumerate([(48, 48), (64, 32), (32, 64), (48, 48)]):
        tau = (1 + i) * random_tasks(*shape, decay=0.9, seed=i, tasks=4)
        rows.append(table_row(tau, name=f"w{i}"))
    return rows


@pytest.mark.parametrize(
    "share",
    [
        0.24,
        1.0,
        1.4,
        2.0,
    ],
)
def test_learned_ranks_reach_the_greedy_oracle(share, oracle_table):
    """From 1.0 on the oracle stores some shared modules dense."""
    budget = int(share * sum(row.rate.dense for row in oracle_table))
    oracle = greedy(oracle_table, budget)
    learned = learn_ranks(oracle_table, budget, start=oracle)
    best = objective(oracle_table, oracle)
    assert objective(oracle_table, learned) <= 1.02 * best
    assert best < 0.9 * objective(oracle_table, uniform(oracle_table, budget))


def test_learning_finds_good_ranks_from_uniform_ones(oracle_table):
    budget = int(0.24 * sum(row.rate.dense for row in oracle_table))
    start = uniform(oracle_table, budget)
    learned = learn_ranks(oracle_table, budget, start=start)
    best = objective(oracle_table, greedy(oracle_table, budget))
    assert objective(oracle_table, learned) <= 1.05 * best
    assert objective(oracle_table, start) > 1.15 * best


@pytest.mark.parametrize("allocation", ["learned", "greedy", "uniform"])
def test_no_shared_rank_where_no_shared_module_is_offered(allocation):
    table = mixed_table(how="none")
    budget = int(0.6 * sum(row.rate.dense for row in table))
    ranks = allocate(allocation, table, budget)
    assert all(int(k[0]) == 0 for k in ranks)
    assert any(bool((k[1:] > 0).any()) for k in ranks)


@pytest.mark.parametrize("allocation", ["learned", "greedy", "uniform"])
def test_truncated_spectra_give_ranks_that_are_known(allocation):
    """The first pass keeps only as many directions as the budget can reach."""
    table = mixed_table()
    budget = 3 * table[0].rate.per_rank
    reach = [budget // row.rate.per_rank for row in table]
    short = [
        table_row((1 + i) * random_tasks(*row.shape, seed=i), name=row.name, max_rank=r)
        for i, (row, r) in enumerate(zip(table, reach))
    ]
    ranks = allocate(allocation, short, budget)
    assert total_cost(short, ranks) <= budget
    for row, k in zip(short, ranks):
        assert bool(((k <= row.sigma.shape[1]) | (k == row.full)).all())
    if allocation != "learned":
        whole = allocate(allocation, table, budget)
        assert [k.tolist() for k in ranks] == [k.tolist() for k in whole]


@pytest.mark.parametrize("allocation", ["learned", "greedy", "uniform"])
def test_fixed_shared_rank_stays_and_is_paid_for(allocation):
    table = [replace(row, shared_rank=2, coupling=None) for row in mixed_table()]
    paid = sum(2 * row.rate.per_rank for row in table)
    budget = paid + int(0.5 * sum(row.rate.dense for row in table))
    ranks = allocate(allocation, table, budget)
    assert all(int(k[0]) == 2 for k in ranks)
    rest = budget - total_cost(table, ranks)
    assert 0 <= rest < max(row.rate.per_rank for row in table)


# --- shared rank and precision per matrix ---------------------------------------


def candidates_of(tau: Tensor, ranks=(0, 1, 2, 4), rounding: float = 0.0):
    m, n = tau.shape[1:]
    row = []
    for k in ranks:
        rest = tau - spectrum(tau.mean(0)).cut(k).dense()
        sigma = torch.stack([spectrum(r).S for r in rest])
        rate = Rate(per_rank=32 * (m + n), dense=32 * m * n)
        nothing = torch.zeros(len(tau))
        row.append(ExpertsCurve(k, rate, "float32", sigma, nothing, rounding))
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
    offers = [[c.weighted(torch.ones(4)) for c in row] for row in options]
    picks, _ = choose(offers, budget)
    assert options[0][picks[0]].shared_rank == 2
    assert options[1][picks[1]].shared_rank == 0


def test_curve_of_a_candidate_is_the_error_of_its_experts():
    tau = random_tasks(20, 9)
    weights = torch.tensor([0.5, 1.0, 2.0])
    error, bits = candidates_of(tau)[1].curve(weights)
    rest = tau - spectrum(tau.mean(0)).cut(1).dense()
    for t in range(3):
        for k in (0, 1, 3):
            left = (rest[t] - spectrum(rest[t]).cut(k).dense()).square().sum()
            assert float(error[t, k]) == pytest.approx(float(weights[t] * left), 1e-4)
            assert int(bits[k]) == k * 32 * 29
    assert bits[-1] == 32 * 180 and bool((error[:, -1] == 0).all())


# --- few bits -------------------------------------------------------------------


@pytest.mark.parametrize("bits, largest", [(8, 3e-4), (4, 2e-2), (3, 6.5e-2), (2, 0.2)])
def test_rounded_factors_are_as_close_as_their_bits_allow(bits, largest):
    g = torch.Generator().manual_seed(10)
    target = torch.randn(40, 6, generator=g) @ torch.randn(6, 30, generator=g)
    energy = float(target.square().sum())
    for matrix in (target, target.mT):
        factors = spectrum(matrix).cut(6)
        for goal in (matrix, None):
            rounded = round_factors(factors, bits=bits, target=goal)
            error = float((rounded.dense() - matrix).square().sum())
            assert error < largest * energy
            assert rounded.error == pytest.approx(error, rel=1e-3, abs=1e-5 * energy)
            low, high = ends(bits)
            assert low <= int(rounded.up.min()) and int(rounded.up.max()) <= high


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounds_within_the_product_lower_the_error(bits, monkeypatch):
    target = torch.randn(60, 90, generator=torch.Generator().manual_seed(11))
    target = spectrum(target).cut(20).dense() + 0.01 * target
    factors, errors = spectrum(target).cut(20), []
    for rounds in (0, quantisation.ROUNDS):
        monkeypatch.setattr(quantisation, "ROUNDS", rounds)
        errors.append(round_factors(factors, bits=bits, target=target).error)
    assert errors[1] < 0.95 * errors[0]


# --- refinement, law 4 --------------------------------------------------------


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
