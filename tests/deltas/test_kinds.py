"""Stored forms: what each does to a tensor, and what it costs."""

from collections.abc import Iterator
from inspect import signature

import pytest
import torch

from fusion_bench_didi.checkpoint.deltas import read_deltas
from fusion_bench_didi.checkpoint.stream import write_deltas
from fusion_bench_didi.deltas import base
from fusion_bench_didi.deltas.banded import BandedLowRankDelta
from fusion_bench_didi.deltas.base import Delta
from fusion_bench_didi.deltas.coded import CodedDelta, CodedLowRankDelta
from fusion_bench_didi.deltas.entries import (
    ScatteredDelta,
    SeededDelta,
    UniformDelta,
    between_ends,
    drawn,
    signs,
)
from fusion_bench_didi.deltas.kinds import KINDS
from fusion_bench_didi.deltas.masks import (
    MaskedDelta,
    SignedDelta,
    SparseDelta,
    bitmap_is_smaller,
    pack_bits,
    unpack_bits,
)
from fusion_bench_didi.deltas.names import escaped, unescaped
from fusion_bench_didi.deltas.plain import DenseDelta, LowRankDelta, SpectralDelta
from fusion_bench_didi.deltas.quantized import (
    AffineDelta,
    RoundedDenseDelta,
    RoundedLowRankDelta,
)
from fusion_bench_didi.deltas.tucker import (
    BasesDelta,
    CoreDelta,
    RoundedBasesDelta,
    RoundedCoreDelta,
)
from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.quantization.coded_matrix import code_product, code_rows
from fusion_bench_didi.quantization.codes import pack_codes
from fusion_bench_didi.quantization.rounding import (
    round_factors,
    round_matrices,
    round_rows,
)

F32 = torch.float32


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _whole(value: torch.Tensor) -> DenseDelta:
    return DenseDelta(tuple(value.shape), value)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5), (2, 3, 4, 5)])
def test_packed_bits_come_back(shape):
    mask = _random(*shape) > 0
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpack_bits(packed, shape), mask)


def test_bit_order_is_that_of_the_docstring():
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[1, 8]] = True
    assert pack_bits(mask).tolist() == [2, 1]


def test_masked_delta():
    shared, mask = _random(3, 5), _random(5, 3).T > 0  # not contiguous
    delta = MaskedDelta.of(mask, 1.5)
    assert torch.equal(delta.change(_whole(shared)), shared * mask * 1.5)
    assert delta.bits == 8 * 2 + 32  # 15 entries and a scalar
    with pytest.raises(ValueError, match="needs the shared tensor"):
        delta.change()


def test_signed_delta():
    shared, signs = _random(3, 9), _random(9).sign()
    delta = SignedDelta.of((3, 9), signs)
    assert torch.equal(delta.change(_whole(shared)), shared * signs)
    assert delta.bits == 8 * 2  # nine columns
    with pytest.raises(ValueError, match="needs the shared tensor"):
        delta.change()


@pytest.mark.parametrize(
    "count, where", [(0, torch.int32), (2, torch.int32), (3, torch.uint8)]
)
def test_sparse_delta_replaces_and_takes_the_cheaper_index(count, where):
    shared = _random(9, 8)  # 72 entries: a bitmap is 9 bytes, an index 4
    value = torch.zeros(72)
    value[torch.tensor([70, 3, 41])[:count]] = torch.tensor([1.0, -2.0, 3.0])[:count]
    value = value.view(9, 8)
    delta = SparseDelta.of(value, torch.float32)
    assert delta.where.dtype == where
    assert delta.bits == 8 * min(4 * count, 9) + 32 * count
    assert torch.equal(delta.change(), value)
    before = shared.clone()
    changed = delta.change(_whole(shared))
    assert torch.equal(changed, torch.where(value != 0, value, shared))
    assert torch.equal(shared, before)


def test_indices_never_overflow():
    assert not bitmap_is_smaller(1, 2**31)
    assert bitmap_is_smaller(1, 2**31 + 1)


def test_spectral_delta():
    up, sigma, down = _random(4, 2), torch.tensor([3.0, 1.0]), _random(2, 6)
    delta = SpectralDelta((4, 2, 3), up, sigma, down)
    expected = (up @ torch.diag(sigma) @ down).view(4, 2, 3)
    torch.testing.assert_close(delta.change(), expected)
    ones = _whole(torch.ones(4, 2, 3))
    torch.testing.assert_close(delta.change(ones), expected + 1)
    assert delta.bits == 32 * 2 * (4 + 6 + 1)


#: only ever shared; in place of what is shared
SHARED, OWN = {"bases", "rounded_bases"}, {"own", "lossless"}


def _pairs() -> dict[str, tuple[Delta, Delta]]:
    """Every form that a task may have, beside a shared part that it may stand on."""
    shape, low = (4, 5), LowRankFactors(_random(4, 2), _random(2, 5))
    shared = LowRankDelta.of(shape, LowRankFactors(_random(4, 1), _random(1, 5)), F32)
    bases = BasesDelta(shape, _random(4, 2), _random(3, 5))
    coarse = RoundedBasesDelta.of(shape, _random(4, 2), _random(3, 5), 4)
    (dense,) = round_matrices([(_random(4, 5), None)], 4)
    own = (
        DenseDelta(shape, _random(4, 5).bfloat16()),
        LowRankDelta.of(shape, low, torch.float16),
        SpectralDelta(shape, low.up, _random(2), low.down),
        MaskedDelta.of(_random(4, 5) > 0, 0.5),
        SignedDelta.of(shape, _random(5).sign()),
        SparseDelta.of(torch.eye(4, 5), F32),
        RoundedDenseDelta.of(shape, dense),
        RoundedLowRankDelta.of(shape, round_factors(low, bits=4)),
        AffineDelta.of(_random(4, 5)),
        BandedLowRankDelta.of(shape, [round_factors(low, bits=b) for b in (8, 3, 2)]),
        UniformDelta.of(*between_ends(_random(4, 5), 3), 3),
        ScatteredDelta.of(torch.eye(4, 5) > 0, *signs(_random(4), 0.5), 1),
        SeededDelta.of(
            shape, _random(int(drawn(7, 2**31, 20).sum())), None, 32, seed=7, keep=2**31
        ),
    )
    own += tuple(_coded(shape))
    pairs = {delta.kind: (shared, delta) for delta in own}
    pairs["core"] = bases, CoreDelta(shape, _random(2, 3))
    pairs["rounded_core"] = coarse, RoundedCoreDelta.of(shape, _random(2, 3), 8)
    return pairs


def _coded(shape: tuple[int, int]) -> Iterator[Delta]:
    yield CodedDelta.of(shape, code_rows(_random(*shape), 0.2, 200.0))
    _, values, vectors = torch.linalg.svd(_random(*shape).mT, full_matrices=False)
    made = code_product(_random(*shape), vectors.mT[:, :2], values[:2], 0.2, 300.0)
    yield CodedLowRankDelta.of(shape, made)


def test_what_a_form_is_made_of_is_shown_and_told():
    assert [*signature(RoundedDenseDelta).parameters] == ["shape", "codes", "scale", "bits"]  # fmt: skip
    with pytest.raises(TypeError, match="DenseDelta: missing .*'value'"):
        DenseDelta((2, 3))

    class Own(DenseDelta):
        def __init__(self, shape, value, more=1):
            super().__init__(shape, value)

    assert [*signature(Own).parameters] == ["shape", "value", "more"]


def test_every_form_of_an_expert_is_tried():
    own = "fusion_bench_didi.deltas."
    here = {k for k, c in KINDS.items() if c.__module__.startswith(own)}
    assert set(_pairs()) == here - SHARED - OWN


@pytest.mark.parametrize("kind", sorted(_pairs()))
def test_what_lies_beyond_the_shared_part(kind):
    shared, delta = _pairs()[kind]
    expected = delta.change(shared) - shared.change()
    decoded = shared.decoded()
    assert decoded.change().equal(shared.change())
    for given in (shared, decoded):
        torch.testing.assert_close(delta.beyond(given), expected)
        product = delta.beyond_product(given)
        if product is not None:
            torch.testing.assert_close(product.dense(), expected)
        whole = torch.full(delta.sides, torch.nan)
        for rows, values in delta.blocks(given):
            whole[rows] = values
        torch.testing.assert_close(whole.view(delta.shape), expected)
        scaled = delta.scaled_product(given, torch.float64)
        assert (scaled is None) == (product is None)
        if scaled is not None:
            up, scale, down = scaled
            up = up if scale is None else up * scale
            torch.testing.assert_close((up @ down).float(), expected.flatten(1))
    factored = {
        "banded_low_rank",
        "coded_low_rank",
        "low_rank",
        "spectral",
        "rounded_low_rank",
        "core",
        "rounded_core",
    }
    assert (product is not None) == (kind in factored)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_blocks_of_rows_are_decoded_by_themselves(bits, monkeypatch):
    codes, scale = round_rows(_random(21, 5), bits)
    delta = RoundedDenseDelta((21, 5), pack_codes(codes, bits), scale, bits)
    monkeypatch.setattr(base, "BLOCK", 40)
    blocks = list(delta.blocks())
    assert [rows.stop for rows, _ in blocks] == [8, 16, 21]
    assert torch.cat([values for _, values in blocks]).equal(delta.own())


@pytest.mark.parametrize("kind", sorted(_pairs()))
def test_a_decoded_shared_part_is_not_decoded_again(kind, monkeypatch):
    shared, delta = _pairs()[kind]
    decoded = shared.decoded()
    for way in ("own", "bases", "change"):
        monkeypatch.setattr(shared, way, lambda *_: 1 / 0, raising=False)
    delta.beyond(decoded), delta.beyond_product(decoded)


ODD_NAMES = ["", "a", "a.b", "a/b", "a~b", "a~1b", "a~0b", "a..b", "a.", ".a", "/", "~"]
ODD_NAMES += ["a\u2024b", "type", "keys", "training", "/a", "a~01b", "~1", "~01"]


def test_escaped_names_hold_no_dots_and_come_back_as_they_were():
    keys = [escaped(name) for name in ODD_NAMES]
    assert not any("." in key for key in keys)
    assert len(set(keys)) == len(ODD_NAMES)
    assert [unescaped(key) for key in keys] == ODD_NAMES


def test_every_kind_is_written_and_read_back(tmp_path):
    deltas = {
        "a.dense": DenseDelta((2, 3), _random(2, 3).bfloat16()),
        "a.low": LowRankDelta((4, 5), _random(4, 1), _random(1, 5)),
        "a.rank0": LowRankDelta((4, 5), torch.zeros(4, 0), torch.zeros(0, 5)),
        "a.spectral": SpectralDelta((4, 5), _random(4, 1), _random(1), _random(1, 5)),
        "a.masked": MaskedDelta.of(_random(3, 3) > 0, 0.5),
        "a.signed": SignedDelta.of((3, 9), _random(9)),
        "a.few": SparseDelta.of(torch.eye(40) * 2, torch.float32),
        "a.many": SparseDelta.of(_random(6, 6), torch.float16),
        "a.none": SparseDelta.of(torch.zeros(6, 6), torch.float32),
    }
    here = {
        kind
        for kind, cls in KINDS.items()
        if cls.__module__.endswith((".plain", ".masks")) and kind != "own"
    }
    assert {delta.kind for delta in deltas.values()} == here
    common = {  # masks and signs are of something
        "a.masked": DenseDelta((3, 3), _random(3, 3)),
        "a.signed": DenseDelta((3, 9), _random(3, 9)),
    }
    manifest = write_deltas(tmp_path, common, {"task": deltas})
    shared, experts = read_deltas(tmp_path, manifest)
    assert list(shared) == list(common)
    for name, delta in deltas.items():
        found = experts["task"][name]
        assert type(found) is type(delta) and found.shape == delta.shape
        assert found.bits == delta.bits
        for part, value in delta.tensors().items():
            assert torch.equal(found.tensors()[part], value)
            assert found.tensors()[part].dtype == value.dtype
        assert not any(p.requires_grad for p in found.parameters())
