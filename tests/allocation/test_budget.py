"""Greedy allocation: the budget is kept, used up to one rank, and goes where it is worth most."""

from dataclasses import replace

import pytest
import torch
from random_tasks import allocate, mixed_table, random_tasks, table_row

from fusion_bench_didi.allocation.learned import truncation_error
from fusion_bench_didi.allocation.spectra import Rate, total_cost
from fusion_bench_didi.allocation.water_filling import greedy


def test_rank_cap_is_the_last_rank_cheaper_than_dense():
    for m, n in [(2, 2), (3, 3), (12, 12), (20, 9), (6, 30), (1, 7)]:
        cap = Rate(per_rank=m + n, dense=m * n).cap
        assert cap * (m + n) < m * n or cap == 0
        assert (cap + 1) * (m + n) >= m * n


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


@pytest.mark.parametrize("budget", [2**49, 2**50, 2**51, 2**62])
@pytest.mark.parametrize("most", [0, 2, 5])
def test_no_budget_buys_what_a_bound_on_the_rank_forbids(most, budget):
    table = mixed_table(how="none")
    table = [replace(row, rate=row.rate.limited(most)) for row in table]
    for row, k in zip(table, greedy(table, budget)):
        assert k[1:].tolist() == [min(most, row.cap)] * 3


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
