"""Codes of few bits: packed, unpacked, and rounded by blocks of rows as by rows."""

import pytest
import torch

from fusion_bench_didi.deltas.plain import DenseDelta
from fusion_bench_didi.deltas.precision import Precision, precisions
from fusion_bench_didi.lowrank import row_blocks as blocks
from fusion_bench_didi.lowrank.factors import energy_of
from fusion_bench_didi.quantization.codes import (
    WIDTHS,
    ends,
    levels,
    offset,
    pack_codes,
    packed_size,
    unpack_codes,
)
from fusion_bench_didi.quantization.rounding import round_matrices, round_rows

CODES = [f"int{bits}" for bits in WIDTHS]


SHAPES = [(1, 1), (7, 5), (6, 8), (40, 3), (3, 90), (30, 11)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)


def pair(shape, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    return tuple(torch.randn(shape, generator=g).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_by_blocks_is_rounding_by_rows(shape, bits, dtype):
    a, b = pair(shape, dtype)
    rests = [a.float() - b.float(), b.float()]
    for rest, found in zip(rests, round_matrices([(a, b), (b, None)], bits)):
        codes, scale = round_rows(rest, bits)
        assert found.codes.equal(pack_codes(codes, bits))
        assert found.scale.equal(scale)
        meant = levels(found.codes, bits, rest.shape) * scale[:, None]
        assert found.error.equal(energy_of(meant - rest))


@pytest.mark.parametrize("name", [*CODES, "bfloat16", "float32"])
def test_error_of_a_dense_delta_is_that_of_what_it_stands_for(name):
    (precision,) = precisions(name, torch.float32)
    a, b = pair((6, 35))
    (delta,), (error,) = precision.dense((6, 5, 7), [(a, b)])
    lost = energy_of(delta.change().flatten(1) - (a - b))
    assert error == pytest.approx(float(lost))
    assert delta.bits == precision.rate(6, 35).dense
    assert (error == 0) == (name == "float32")


def test_dense_delta_shares_no_memory_with_what_it_was_made_of():
    a, _ = pair((4, 4))
    as_is = Precision("float32", 32, torch.float32)
    (delta,), _ = as_is.dense((4, 4), [(a, None)])
    assert isinstance(delta, DenseDelta)
    assert delta.value.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 4), (0, 3), (7,), (16, 3)])
def test_codes_come_back(shape, bits):
    low, high = ends(bits)
    g = torch.Generator().manual_seed(9)
    codes = torch.randint(low, high + 1, shape, generator=g, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.nbytes == packed_size(codes.numel(), bits)
    assert unpack_codes(packed, bits, shape).equal(codes)
    assert levels(packed, bits, shape).equal(codes + offset(bits))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_lie_side_by_side_low_bits_first(bits):
    codes = torch.arange(*ends(bits), dtype=torch.int8)
    number = sum(
        (int(c) + 2 ** (bits - 1)) << (bits * i) for i, c in enumerate(codes.tolist())
    )
    size = packed_size(len(codes), bits)
    assert bytes(pack_codes(codes, bits).tolist()) == number.to_bytes(size, "little")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_as_many_on_both_sides_of_zero(bits):
    low, high = ends(bits)
    assert low + offset(bits) == -(high + offset(bits))


@pytest.mark.parametrize("shape", [(7, 13), (0, 5), (64, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_the_same_in_every_type(bits, dtype, shape):
    low, high = ends(bits)
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    expected = codes.double() + offset(bits)
    assert levels(packed, bits, shape, dtype).equal(expected.to(dtype))
