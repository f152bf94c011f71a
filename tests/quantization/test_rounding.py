"""Rounded factors are as close as their bits allow, and as the allocation expects."""

import pytest
import torch

from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.lowrank.svd import spectrum
from fusion_bench_didi.quantization import rounding as quantisation
from fusion_bench_didi.quantization.codes import WIDTHS, ends, offset
from fusion_bench_didi.quantization.rounding import (
    RELATIVE_ERROR,
    RoundedFactors,
    round_factors,
    round_rows,
)


def entries(rounded: RoundedFactors) -> torch.Tensor:
    """What codes stand for, by the definition."""
    half = offset(rounded.bits)
    return ((rounded.up + half) * rounded.scale) @ (rounded.down + half)


@pytest.mark.parametrize("bits, largest", [(8, 3e-4), (4, 2e-2), (3, 6.5e-2), (2, 0.2)])
def test_rounded_factors_are_as_close_as_their_bits_allow(bits, largest):
    g = torch.Generator().manual_seed(10)
    target = torch.randn(40, 6, generator=g) @ torch.randn(6, 30, generator=g)
    energy = float(target.square().sum())
    for matrix in (target, target.mT):
        factors = spectrum(matrix).cut(6)
        for goal in (matrix, None):
            rounded = round_factors(factors, bits=bits, target=goal)
            error = float((entries(rounded) - matrix).square().sum())
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


@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_error_is_what_the_allocation_expects(bits):
    rows = torch.randn(64, 400, generator=torch.Generator().manual_seed(0))
    codes, scale = round_rows(rows, bits)
    low, high = ends(bits)
    assert low <= int(codes.min()) and int(codes.max()) <= high
    meant = (codes + offset(bits)) * scale[:, None]
    error = (meant - rows).square().sum() / rows.square().sum()
    assert error < 1.3 * RELATIVE_ERROR[bits]


@pytest.mark.parametrize("bits", WIDTHS)
def test_refitting_the_second_factor_helps(bits):
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(40, 60, generator=generator)
    factors = spectrum(target).cut(12)
    fitted = round_factors(factors, bits=bits, target=target)
    up, a = round_rows(factors.up.mT, bits)
    down, b = round_rows(factors.down, bits)
    half = offset(bits)
    naive = ((up + half) * a[:, None]).mT @ ((down + half) * b[:, None])
    loss = (entries(fitted) - target).square().sum()
    assert loss < (naive - target).square().sum()


def test_rank_zero_survives_rounding():
    empty = round_factors(LowRankFactors.zeros(3, 5, like=torch.zeros(1)), bits=4)
    assert entries(empty).shape == (3, 5)
