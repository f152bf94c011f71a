"""Bounds of spectra from samples."""

import pytest
import torch
from steep_layers import decaying, low_rank

from fusion_bench_didi.lowrank.spectrum_bounds import optimistic_spectrum, sampled


@pytest.mark.parametrize("make", [decaying, low_rank])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_optimistic_spectrum_keeps_no_less_than_any_directions_do(shape, make):
    """On average over samples; here over matrices."""
    rank, numel = 20, shape[0] * shape[1]
    matrices = torch.stack([make(*shape, seed) for seed in range(8)])
    energy = matrices.double().square().sum((1, 2))
    rows, columns = sampled(shape[0], 60), sampled(shape[1], 60)
    samples = matrices[:, rows[:, None], columns]
    sigma, tail = optimistic_spectrum(samples, energy, numel, rank=rank)
    squares = sigma.double().square()
    torch.testing.assert_close(squares.sum(1) + tail, energy)
    held = torch.linalg.svdvals(matrices)[:, :rank].square()
    kept = (squares.cumsum(1) / energy[:, None]).mean(0)
    true = (held.cumsum(1) / energy[:, None]).mean(0)
    assert bool((kept >= true - 0.02).all())
    assert make is low_rank or kept[-1] < 0.95


def test_samples_depend_on_the_side_alone():
    assert sampled(50, 10).equal(sampled(50, 10))
    assert sampled(50, 10).equal(sampled(50, 10).unique())
    assert sampled(5, 10).equal(torch.arange(5))
