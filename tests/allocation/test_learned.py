"""Learned ranks (Eq. 8): the quadratic form is the dense loss, and learning reaches the greedy oracle."""

from dataclasses import replace

import pytest
import torch
from random_tasks import SHAPES, allocate, mixed_table, random_tasks, table_row
from torch import Tensor

from fusion_bench_didi.allocation.learned import (
    _Group,
    gate,
    hard_gate,
    learn_ranks,
    truncation_error,
)
from fusion_bench_didi.allocation.spectra import MatrixSpectra, Rate
from fusion_bench_didi.allocation.water_filling import fill, greedy, uniform
from fusion_bench_didi.lowrank.decomposition import decompose
from fusion_bench_didi.lowrank.factors import full_rank
from fusion_bench_didi.lowrank.static_merge import shared_matrix


def test_no_module_gets_more_rank_than_it_needs():
    row = MatrixSpectra(
        "w",
        (30, 20),
        sigma=torch.tensor([[3.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4]),
        tail_energy=torch.zeros(3),
        weights=torch.ones(2),
        rate=Rate(32 * 50, 32 * 600),
    )
    assert row.needed.tolist() == [2, 1, 0]
    for ranks in (uniform([row], 2**40), fill([row], [torch.zeros(3).long()], 2**40)):
        assert ranks[0].tolist() == [2, 1, 0]


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
