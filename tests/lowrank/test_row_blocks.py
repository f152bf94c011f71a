"""Passes over blocks of rows give what passes over whole matrices give."""

import pytest
import torch

from fusion_bench_didi.lowrank import row_blocks as blocks
from fusion_bench_didi.lowrank.factors import energy_of
from fusion_bench_didi.lowrank.row_blocks import (
    blocks_of_rows,
    differences,
    materialize,
    mean_of,
    minus,
    squared_norms,
)

SHAPES = [(1, 1), (7, 5), (6, 8), (40, 3), (3, 90), (30, 11)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)


def pair(shape, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    return tuple(torch.randn(shape, generator=g).to(dtype) for _ in range(2))


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4)])
def test_blocks_cover_all_rows_once_and_begin_at_whole_bytes(shape):
    rows = list(blocks_of_rows(torch.zeros(shape)))
    assert [i for r in rows for i in range(r.start, r.stop)] == list(range(shape[0]))
    assert all(r.start % 8 == 0 for r in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_energy_of_a_difference(shape, dtype):
    a, b = pair(shape, dtype)
    expected = energy_of(a.float() - b.float())
    found = squared_norms([(a, b), (a, a), (a, None), (b, a)])
    assert found.equal(
        torch.stack([expected, 0 * expected, energy_of(a.float()), expected])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_of_differences(shape, dtype):
    (a, b), weights = pair(shape, dtype), torch.tensor([1.0, 0.0, 3.0])
    x, y = a.float() - b.float(), a.float()
    expected = 0.25 * x + 0.75 * y
    torch.testing.assert_close(mean_of([(a, b), (b, a), (a, None)], weights), expected)
    both = mean_of([(a, b), (a, None)], torch.zeros(2))
    torch.testing.assert_close(both, (x + y) / 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_is_taken_away_as_well(shape):
    a, b = pair(shape)
    part = torch.ones(shape)
    rest = minus([(a, b), (b, b), (a, None)], part)
    assert rest[0][1] is rest[1][1]  # still read from memory once
    for found, (x, y) in zip(rest, [(a, b), (b, b), (a, None)]):
        torch.testing.assert_close(materialize(found), materialize((x, y)) - part)
    assert minus([(a, b)], None) == [(a, b)]


def test_energy_is_zero_only_where_nothing_differs():
    a, b = torch.zeros(3, 4), torch.zeros(3, 4)
    a[1, 2] = 1e-30  # its square underflows
    assert 0 < squared_norms([(a, b)]) < 1e-59
    assert 0 < squared_norms([(a, None)]) < 1e-59
    a[1, 2] = torch.nan
    assert squared_norms([(a, b)]).isnan()


def test_differences_take_turns_and_each_is_its_own():
    a, b = pair((40, 3))
    terms = [(a, b), (b, None), (b, a), (a, a)]
    found = torch.full((4, 40, 3), torch.nan)
    for t, rows, x in differences(terms):
        found[t, rows] = x
    assert found.equal(torch.stack([a - b, b, b - a, a - a]))
