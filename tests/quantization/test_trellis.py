"""Numbers along a trellis: the best of all paths, read back by parities, and as many bits and as much error as tables say."""

import itertools
import math

import pytest
import torch
from helpers import didi, normal

from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.merging.settings import Budget, MergeSettings
from fusion_bench_didi.quantization import gaussian_tables as tables
from fusion_bench_didi.quantization import trellis
from fusion_bench_didi.quantization.coded_matrix import code_product, code_rows
from fusion_bench_didi.quantization.dead_zone import (
    CLASSES,
    Codes,
    decode,
    decode_blocks,
    encode,
    quantize,
    rate_distortion,
)
from fusion_bench_didi.quantization.entropy import StreamError
from fusion_bench_didi.quantization.gaussian_tables import (
    FIRST,
    LOWEST,
    RESTORED,
    TOP,
    TRELLIS,
)

QUARTER = 0.25


def spread_of(c: int) -> float:
    return 2 ** (LOWEST + c / tables.PER_OCTAVE)


def one_by_one(numbers: list[int], stretch: float) -> list[float]:
    """What numbers stand for, by the definition."""
    found, book, before = [], 0, 0
    for k in numbers:
        found.append((-1) ** book * (k + QUARTER) * (1 + stretch))
        book, before = before ^ (k % 2), book
    return found


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_numbers_are_read_by_the_parities_before_them(n):
    numbers = torch.randint(-5, 6, (7, n), generator=torch.Generator().manual_seed(n))
    stretch = torch.linspace(-0.2, 0.1, 7)
    found = trellis.values(numbers.int(), stretch)
    for row, more, values in zip(numbers.tolist(), stretch.tolist(), found.tolist()):
        assert values == pytest.approx(one_by_one(row, more))


def test_no_path_is_better():
    rows, most = 1.2 * normal(6, 5, seed=3), 2
    stretch = torch.full((6,), -0.1)
    reach = torch.full((6,), most, dtype=torch.int32)
    lengths = torch.tensor([4.0, 2.5, 1.0, 2.0, 3.5])

    def bits(numbers, _):
        return lengths[(numbers + most).long()]

    found = trellis.best_paths(rows, stretch, reach, bits)
    every = torch.tensor([*itertools.product(range(-most, most + 1), repeat=5)]).int()
    values = trellis.values(every, torch.full((len(every),), -0.1))
    taken = lengths[(every + most).long()].sum(1)
    for row, path in zip(rows, found):
        costs = (values - row).square().sum(1) + trellis.SLOPE * taken
        (which,) = (every == path).all(1).nonzero()[0].tolist()
        assert float(costs[which]) == pytest.approx(float(costs.min()), rel=1e-5)


@pytest.mark.parametrize("n", [800, 1537])
def test_parts_of_few_rows_are_walked_side_by_side(n, monkeypatch):
    rows = 1.5 * normal(3, n, seed=5)
    costs = []
    for part in (n, 200):
        monkeypatch.setattr(trellis, "PART", part)
        codes = quantize(rows, 1.0, "trellis")
        assert bool((codes.classes >= TRELLIS).all())
        lost = codes.squared_error(rows, 1.0)
        costs.append(lost + trellis.SLOPE * codes.bits)
    whole, parts = costs
    assert whole < parts < 1.01 * whole
    # every part but the last one ends in the state that rows begin in
    length = -(-n // (n // 200))
    books = trellis.codebooks(codes.symbols)
    assert not books[:, length::length].any()


@pytest.mark.parametrize("spread", [1.0, 60.0, 2000.0])
def test_long_rows_of_large_numbers_lose_no_more_than_others(spread):
    """Sums of squares along a row would be beyond what float32 tells apart."""
    rows = spread * normal(2, 6000, seed=7)
    codes = quantize(rows, 1.0, "trellis")
    assert codes.squared_error(rows, 1.0) / rows.numel() < 0.07


def test_values_beyond_the_largest_number_go_to_it():
    rows = torch.tensor([[9.0, -9.0, 9.0, 0.1, -9.0, 9.0]])
    reach, stretch = torch.tensor([3], dtype=torch.int32), torch.zeros(1)
    found = trellis.best_paths(rows, stretch, reach, lambda k, _: k.abs().float())
    far = found[0, [0, 1, 2, 4, 5]]
    assert int(found.abs().max()) <= 3 and bool((far.abs() >= 2).all())
    values = trellis.values(found, stretch)
    assert bool((values.sign() == rows.sign())[0, [0, 1, 2, 4, 5]].all())


@pytest.mark.parametrize("c", [FIRST, 5, 8, 11, 14, TOP - 1, TOP + 2, TOP + 9])
def test_bits_and_error_of_gaussian_rows_are_those_of_the_tables(c):
    x = spread_of(c) * normal(40, 3000, seed=c)
    codes = quantize(x, 1.0, "trellis")
    assert bool((codes.classes == TRELLIS + c).float().mean() > 0.9)
    rate, lost = (
        float(v) for v in rate_distortion(torch.tensor(spread_of(c)), "trellis")
    )
    assert codes.bits / x.numel() == pytest.approx(rate, rel=0.02)
    assert codes.squared_error(x, 1.0) / x.numel() == pytest.approx(lost, rel=0.02)


@pytest.mark.parametrize("c", range(FIRST + 1, TOP + 4))
def test_at_equal_error_a_seventh_of_a_bit_is_saved(c):
    spread = torch.tensor(spread_of(c), dtype=torch.float64)
    rate, lost = (float(v) for v in rate_distortion(spread, "trellis"))
    steps = 2 ** torch.linspace(-2, 0.2, 2000, dtype=torch.float64)
    rates, errors = rate_distortion(spread / steps)
    same = int((errors * steps**2 - lost).abs().argmin())
    bound = 0.5 * math.log2(float(spread) ** 2 / lost)
    assert 0.14 < float(rates[same]) - rate < 0.19 and rate > bound


def test_frequencies_are_of_every_number_and_of_both_signs():
    for c in range(TRELLIS + FIRST, TRELLIS + TOP):
        counts = tables.table(c).double()
        assert len(counts) == 2 * tables.largest(c) + 1 and bool((counts > 0).all())
        right, left = counts[tables.largest(c) + 1 :], counts[: tables.largest(c)]
        assert float(right.sum()) < float(left.sum())  # 3/4 is nearer than 5/4
        assert float(counts.sum()) == pytest.approx(2**16, rel=0.003)


def odd_rows() -> torch.Tensor:
    """Rows of all kinds: zeros, small, large, of a few large values."""
    spreads = torch.cat([torch.zeros(2), 2 ** torch.linspace(-3, 12, 24)])
    rows = spreads[:, None] * normal(26, 33, seed=5)
    rows[7, 3], rows[11, 0] = 80.0, -900.0
    return rows


@pytest.mark.parametrize("block", [1, 100, 2**18])
def test_what_is_read_is_what_was_written(block):
    parts = [quantize(x, 0.5, "trellis") for x in (odd_rows(), normal(5, 1), normal(0, 4))]  # fmt: skip
    assert {int(c) >= TRELLIS for c in parts[0].classes} == {True, False}
    stream, shapes = encode(parts), [(p.classes, p.symbols.shape[1]) for p in parts]
    for codes, found in zip(parts, decode(stream, shapes)):
        assert found.equal(codes.values())
    made = [torch.full(p.symbols.shape, torch.nan) for p in parts]
    for part, rows, values in decode_blocks(stream, shapes, block):
        made[part][rows] = values
    for codes, found in zip(parts, made):
        assert found.equal(codes.values())


def test_rows_stand_for_what_the_definition_says():
    codes = quantize(odd_rows(), 0.5, "trellis")
    for symbols, c, values in zip(codes.symbols, codes.classes.tolist(), codes.values()):  # fmt: skip
        if c >= TRELLIS:
            expected = one_by_one(symbols.tolist(), tables.stretch(c - TRELLIS))
            assert values.tolist() == pytest.approx(expected)
        else:
            alone = Codes(symbols[None], codes.classes.new_tensor([c])).values()[0]
            assert values.equal(alone)


@pytest.mark.parametrize("c", [RESTORED + TOP, TRELLIS, TRELLIS + FIRST - 1, TRELLIS + RESTORED, TRELLIS + RESTORED + TOP, 255])  # fmt: skip
def test_classes_that_there_are_not_are_refused(c):
    codes = quantize(normal(3, 8), 0.5, "trellis")
    wrong = codes.classes.clone()
    wrong[1] = c
    with pytest.raises(StreamError, match=f"{c} is no class of spread"):
        decode(encode([codes]), [(wrong, 8)])


def directions(m: int, n: int, rank: int = 16) -> tuple[torch.Tensor, ...]:
    """A matrix of falling singular values, its leading directions, and the error of all that is beyond them."""
    size = min(m, n)
    u, v = (torch.linalg.qr(normal(side, size, seed=side))[0] for side in (m, n))
    values = 0.9 ** torch.arange(size).float()
    target = (u * values) @ v.mT
    vectors = (v if m >= n else u)[:, :rank]
    return target, vectors, values[:rank], float(values[rank:].square().sum())


@pytest.mark.parametrize("shape", [(80, 128), (192, 64)])
@pytest.mark.parametrize("part", [0.4, 0.8])
def test_a_matrix_loses_less_in_the_same_bits(shape, part):
    target, vectors, values, beyond = directions(*shape)
    bits, lost, entries = part * target.numel(), {}, {}
    for q in ("scalar", "trellis"):
        coded = code_product(target, vectors, values, 0.05, bits, quantizer=q)
        rows = code_rows(target, 0.05, 5 * bits, quantizer=q)
        assert coded.bits <= bits and rows.bits <= 5 * bits
        lost[q], entries[q] = coded.error - beyond, rows.error
    assert lost["trellis"] < 0.95 * lost["scalar"]
    assert entries["trellis"] < 0.9 * entries["scalar"]


def test_rows_of_few_large_values_stay_as_they_are():
    x = 3 * normal(8, 400)
    x[::2] *= torch.rand(4, 400, generator=torch.Generator().manual_seed(1)) < 0.05
    along = quantize(x, 1.0, "trellis").classes >= TRELLIS
    assert along.tolist() == [False, True] * 4
    both, alone = quantize(x, 1.0, "trellis"), quantize(x, 1.0)
    cost = [c.squared_error(x, 1.0) + trellis.SLOPE * c.bits for c in (both, alone)]
    assert cost[0] < cost[1]


def test_a_merge_loses_less_in_the_same_storage(tiny_clip, tmp_path):
    pool = tiny_clip.pool_models()
    scalar, along = (
        didi(pool, budget=0.2, factor_dtype="auto", quantizer=q)
        for q in ("scalar", "trellis")
    )
    assert along.info["relative_error"] < 0.97 * scalar.info["relative_error"]
    assert along.storage.x_excl <= 0.2
    along.save_pretrained(tmp_path / "merged")
    stored = sum(d.bits for e in along.modulators.values() for d in e.deltas.values())
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert 0 <= 8 * size - stored < 8 * 2**16 + 0.5 * stored
    again = type(along).from_pretrained(tmp_path / "merged", backbone=along.backbone)
    for task in along.tasks:
        expected = along.materialize(task).state_dict()
        for name, value in again.materialize(task).state_dict().items():
            assert value.equal(expected[name]), name


def test_without_codes_it_has_no_effect_and_says_so():
    with pytest.raises(SettingsError, match="quantizer is of factor_dtype=auto"):
        MergeSettings(Budget(0.5), factor_dtype="int4", quantizer="trellis")
    with pytest.raises(SettingsError, match="quantizer"):
        MergeSettings(Budget(0.5), quantizer="lattice")
