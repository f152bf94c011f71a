"""The bound that codes are held against: no code is below it, and it is left where it was."""

import math

import pytest
import torch

from benchmarks.bound import at_the_bound, bits_for, error_at, gaussian_bound
from fusion_bench_didi.allocation.coded_curve import CodedCurve
from fusion_bench_didi.quantization.dead_zone import SLOPES, rate_distortion


def test_no_code_is_below_the_bound():
    spread = 2.0 ** torch.linspace(-6, 12, 200)
    (rate, error), (least_rate, least) = (
        f(spread) for f in (rate_distortion, gaussian_bound)
    )
    assert bool(
        (
            error + SLOPES["scalar"] * rate
            >= least + SLOPES["scalar"] * least_rate - 1e-9
        ).all()
    )
    fine = spread > 8  # a quarter of a bit above it, Gish and Pierce
    gap = (rate - least_rate)[fine] + (error / least)[fine].log2() / 2
    assert gap.tolist() == pytest.approx([math.log2(math.pi * math.e / 6) / 2] * int(fine.sum()), abs=0.02)  # fmt: skip


def test_the_bound_is_the_gaussian_rate_distortion_function():
    rate, error = gaussian_bound(torch.tensor([0.0, 0.1, 12**-0.5, 3.0, 100.0]))
    assert rate[:3].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert error[:2].tolist() == pytest.approx([0, 0.01], abs=1e-6)
    energy = torch.tensor([9.0, 10000.0]).double()
    assert torch.allclose(error[3:], energy * 4.0 ** -rate[3:])


def test_curves_at_the_bound_lose_less_in_the_same_bits_and_are_themselves_again():
    sigma = torch.arange(1, 65).float().reciprocal()[None].expand(2, -1)
    energy = sigma.double().square().sum(1)
    curves = [CodedCurve((64, 256), sigma, energy, torch.ones(2))]
    bits = 0.5 * 64 * 256
    before = error_at(curves, bits)
    with at_the_bound():
        least, fewer = error_at(curves, bits), bits_for(curves, before)
    assert 0.5 * before < least < 0.95 * before and 0.6 * bits < fewer < 0.95 * bits
    assert error_at(curves, bits) == before
    assert bits_for(curves, before) == pytest.approx(bits, rel=0.02)
