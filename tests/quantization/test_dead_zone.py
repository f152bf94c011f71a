"""Entropy-coded uniform quantization: fixed tables, near the Gaussian bound, exact streams, matrices within their bits."""

import math
import statistics

import pytest
import torch
from helpers import normal
from rans import edges_of, reader
from torch import Tensor

from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.quantization import coded_matrix
from fusion_bench_didi.quantization import gaussian_tables as tables
from fusion_bench_didi.quantization.coded_matrix import (
    code_product,
    code_rows,
    unit_rows,
)
from fusion_bench_didi.quantization.dead_zone import (
    CLASS_BITS,
    Codes,
    decode,
    decode_blocks,
    encode,
    quantize,
    rate_distortion,
)
from fusion_bench_didi.quantization.entropy import StreamError


def test_tables_are_those_of_the_first_release():
    """Files are read by them: they may never change."""
    assert tables.table(0).tolist() == [1] * 8 + [2, 65531, 2] + [1] * 8
    middle = len(tables.table(8)) // 2
    found = tables.table(8).tolist()[middle : middle + 7]
    assert found == [25854, 15601, 3852, 374, 14, 1, 1]
    total = sum(
        (c + 1) * (i + 1) * int(weight)
        for c in range(tables.TOP)
        for i, weight in enumerate(tables.table(c).int())
    )
    assert total == 445805822


@pytest.mark.parametrize("spread", range(tables.TOP))
def test_tables_are_gaussian(spread):
    std, zone = 2 ** (spread / 4 - 2), float(tables.dead_zone(spread))
    found, most = tables.table(spread).tolist(), tables.largest(spread)
    normal = statistics.NormalDist(0, std)
    assert len(found) == 2 * most + 1
    for k in range(1, most):
        p = normal.cdf(k + 0.5 + zone) - normal.cdf(k - 0.5 + zone)
        assert found[most + k] == found[most - k] == pytest.approx(2**16 * p, abs=1.01)
    zero = 1 - 2 * normal.cdf(-0.5 - zone)
    assert found[most] == pytest.approx(min(2**16 * zero, 2**16 - 1), abs=1.01)


def test_no_class_reaches_less_far_than_the_one_below():
    reach = [
        tables.largest(tables.coded_class(c)) << tables.low_bits(c)
        for c in range(tables.CLASSES)
    ]
    assert reach == sorted(reach)


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.5, 0.7, 1.0, 3.0, 9.0, 40.0, 1000.0])
def test_gaussian_rows_take_what_the_curve_says(spread):
    x = spread * normal(64, 2000)
    codes = quantize(x, 1.0)
    bits = (codes.bits - CLASS_BITS * 64) / x.numel()
    error = float((codes.values() - x).square().mean())
    rate, lost = (float(v) for v in rate_distortion(torch.tensor([spread])[0]))
    assert bits == pytest.approx(rate, rel=0.01, abs=0.01)
    assert error == pytest.approx(lost, rel=0.02)
    bound = max(0.5 * math.log2(spread**2 / lost), 0.0)
    assert bound <= rate + 1e-2 and rate < bound + 0.26


def test_the_curve_falls():
    spreads = torch.logspace(-3, 6, 300)
    bits, error = rate_distortion(spreads)
    relative = error / spreads.double().square()
    assert (bits.diff() >= 0).all() and (relative.diff() <= 0.01).all()
    assert relative.max() <= 1.01


def odd_rows() -> Tensor:
    """Of all spreads, some of single large values."""
    x = normal(60, 50) * torch.logspace(-3, 5, 60)[:, None]
    x[5], x[6, 7], x[20, 3] = 0.0, 1e3, 1e5
    return x


def test_nothing_is_cut_off():
    x = odd_rows()
    codes = quantize(x, 0.5)
    assert ((codes.values() * 0.5 - x).abs() <= 0.5).all()
    assert not codes.symbols[5].any()


def test_streams_come_back():
    codes, few = quantize(odd_rows(), 0.5), quantize(normal(7, 9), 0.3)
    none = quantize(torch.zeros(0, 4), 1.0)
    parts = [codes, none, few]
    stream = encode(parts)
    bits = sum(part.bits - CLASS_BITS * len(part) for part in parts)
    assert bits <= 8 * len(stream) <= 1.001 * bits + 64
    lengths = [(part.classes, part.symbols.shape[1]) for part in parts]
    for found, part in zip(decode(stream, lengths), parts):
        assert torch.equal(found, part.values())
    for block in (1, 1000):
        rows = [[], [], []]
        for part, which, values in decode_blocks(stream, lengths, block):
            rows[part] += zip(which.tolist(), values)
        for found, part in zip(rows, parts):
            assert sorted(which for which, _ in found) == list(range(len(part)))
            assert all(row.equal(part.values()[which]) for which, row in found)
    classes = few.classes.clone()
    classes[0] = tables.RESTORED + tables.TOP
    with pytest.raises(StreamError, match="97 is no class of spread"):
        decode(stream, [*lengths[:2], (classes, 9)])
    for damaged in (stream[:-4], stream[4:], stream[:-1], stream.new_zeros(4)):
        with pytest.raises(StreamError):
            decode(damaged, lengths)


def by_the_book(stream: bytes, classes: list[int], n: int) -> list[list[int]]:
    """Numbers of rows: high bits of all rows of a class, then their low bits."""
    read = reader(stream)
    rows: list[list[int]] = [[] for _ in classes]
    for spread in sorted(set(classes)):
        low = 0
        while spread >= 20:  # an octave less for each bit
            spread, low = spread - 4, low + 1
        here = [i for i, c in enumerate(classes) if c == spread + 4 * low]
        std = 2 ** (spread / 4 - 2)
        most = math.ceil(8 * std) + 7
        edges = edges_of(tables.table(spread).tolist())
        even = [2 ** (24 - low) * i for i in range(2**low + 1)]
        high = [[read(edges) - most for _ in range(n)] for _ in here]
        rest = [[read(even) if low else 0 for _ in range(n)] for _ in here]
        for i, hs, ls in zip(here, high, rest):
            rows[i] = [(h << low) + l - (1 << low >> 1) for h, l in zip(hs, ls)]
    return rows


def test_an_independent_decoder_reads_them():
    codes = quantize(odd_rows()[:50, :20], 0.5)
    assert int(codes.classes.max()) > 30, "low bits are tried"
    stream = encode([codes]).numpy().tobytes()
    found = by_the_book(stream, codes.classes.tolist(), 20)
    assert found == codes.symbols.tolist()


@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
@pytest.mark.parametrize("c", range(4, tables.TOP + 2))
def test_restored_rows_are_as_long_as_the_signal(c, quantizer):
    """Values of least squared error are shorter by what is lost; longer ones are of the same numbers and bits."""
    x = 2.0 ** (c / tables.PER_OCTAVE + tables.LOWEST) * normal(20, 4000, seed=c)
    codes = quantize(x, 1.0, quantizer)
    before = codes.held(x, 1.0)
    after = codes.restored(before)
    assert after.symbols.equal(codes.symbols) and after.bits == codes.bits
    assert float(after.held(x, 1.0).mean()) == pytest.approx(1.0, abs=0.02)
    assert after.values().allclose(after.gains[:, None] * codes.values())
    if c < tables.TOP - 8:  # from there on nothing is lost
        assert float((after.classes != codes.classes).float().mean()) > 0.9
        assert float(before.mean()) < 0.98
    stream = encode([after])
    (found,) = decode(stream, [(after.classes, x.shape[1])])
    assert stream.equal(encode([codes])) and found.equal(after.values())


@pytest.mark.parametrize("c", range(2, tables.TOP))
def test_gains_are_what_an_integral_says(c):
    """One over the part of a Gaussian signal that values of least squared error hold, twice at most."""
    spread = 2 ** (c / 4 - 2)
    x = torch.linspace(0, 12 * spread, 200_001, dtype=torch.float64)
    mass = (-((x / spread) ** 2) / 2).exp()
    numbers = (x + 0.5 - min(0.0165 / spread**3, 0.49)).floor()
    one, two = (
        float((x * mass)[numbers == k].sum() / mass[numbers == k].sum()) for k in (1, 2)
    )
    farther = torch.where(numbers == 1, one, numbers - 2 + two)
    values = torch.where(numbers == 0, 0.0, farther)
    lost = float(((x - values).square() * mass).sum() / (x.square() * mass).sum())
    expected = min(1 / (1 - lost), 2)
    assert tables.gain(tables.RESTORED + c) == pytest.approx(expected, abs=1 / 256)


def test_gains_are_the_same_on_every_machine():
    """In 256ths: files that are written hold classes, not gains."""
    along = range(tables.TRELLIS + tables.FIRST, tables.TRELLIS + tables.TOP)
    found = [
        [round(256 * tables.gain(tables.RESTORED + c)) for c in classes]
        for classes in (range(tables.TOP), along)
    ]
    assert found == [
        [512] * 4 + [408, 335, 304, 288, 278, 271, 267, 264, 261, 260, 259, 258, 257, 257, 257, 256],
        [410, 350, 316, 297, 284, 275, 269, 265, 262, 260, 259, 258, 258, 257, 257, 257, 256],
    ]  # fmt: skip


def test_nothing_is_made_longer_that_is_not_too_short():
    """Rows of few large values lose less than Gaussian ones; coarse ones are made twice as long at most."""
    sparse = torch.zeros(4, 400)
    sparse[:, 7], sparse[:, 100] = 6.0, -9.0
    codes = quantize(sparse, 1.0)
    assert codes.restored(codes.held(sparse, 1.0)).classes.equal(codes.classes)
    coarse = 0.3 * normal(10, 2000)
    codes = quantize(coarse, 1.0)
    assert float(codes.restored(codes.held(coarse, 1.0)).gains.max()) == 2.0
    fine = 1e4 * normal(10, 50)
    codes = quantize(fine, 1.0)
    assert codes.restored(codes.held(fine, 1.0)).classes.equal(codes.classes)
    empty = quantize(torch.zeros(3, 5), 1.0)
    assert empty.restored(empty.held(torch.zeros(3, 5), 1.0)).gains.eq(1).all()


@pytest.mark.parametrize("scale", [1e-35, 1e30])
def test_what_is_held_does_not_depend_on_the_unit(scale):
    x = normal(6, 300)
    one, other = (quantize(s * x, 0.8 * s) for s in (1.0, scale))
    same = one.held(x, 0.8)
    assert other.held(scale * x, 0.8 * scale).allclose(same, rtol=1e-4)


def test_there_are_no_other_classes():
    found = {c for c in range(256) if tables.is_class(c)}
    plain = set(range(tables.CLASSES + tables.TOP))
    along = {128 + c for c in plain if tables.unrestored(c) >= tables.FIRST}
    assert found == plain | along
    assert all(tables.gain(c) == 1 for c in found if tables.unrestored(c) == c)


def decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading singular vectors of the short side, and values."""
    a = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    _, values, vectors = torch.linalg.svd(a, full_matrices=False)
    return vectors[:rank].mT, values[:rank]


def product(short: Codes, long: Codes, step: float, wide: bool) -> Tensor:
    unit = unit_rows(short.values()) * short.gains[:, None]
    made = unit.mT @ (long.values() * step)
    return made if wide else made.mT


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (30, 30)])
@pytest.mark.parametrize("restored", [False, True])
def test_products_take_their_bits_and_tell_their_error(shape, restored):
    m, n = shape
    target = normal(m, n) @ torch.diag(torch.logspace(0, -2, n)) @ normal(n, n, seed=1)
    vectors, values = decomposed(target, 12)
    step = float(values[-1]) / max(shape) ** 0.5
    bits = quantize((vectors * values).mT, step).bits * (m + n) / min(m, n)
    last = torch.inf
    for part in (0.5, 0.7, 0.9):
        near = step * 2 ** ((1 - part) * bits / (12 * (m + n)))
        given = target, vectors, values, near, part * bits
        coded = code_product(*given, restored=restored)
        assert 0.9 * part * bits < coded.bits <= part * bits
        made = product(*coded.sides, coded.step, wide=m < n)
        error = float((made - target).square().sum())
        assert coded.error == pytest.approx(error, rel=1e-3)
        if not restored:
            assert error < last
            last = error


def test_products_of_factors_are_never_multiplied_out():
    factors = LowRankFactors(normal(40, 5), normal(5, 30, seed=1))
    vectors, values = decomposed(factors.dense(), 5)
    step = float(values[-1]) / 40
    one = code_product(factors, vectors, values, step, 1500.0)
    other = code_product(factors.dense(), vectors, values, step, 1500.0)
    assert one.error == pytest.approx(other.error, rel=1e-3)


@pytest.mark.parametrize("bits", [1.4, 2.0])
@pytest.mark.parametrize("shape", [(200, 200), (120, 300)])
def test_directions_are_as_long_as_they_were(shape, bits):
    """Both sides are rounded, and each makes good what that takes."""
    up, down = normal(shape[0], 8), normal(8, shape[1], seed=1)
    target = up @ down
    vectors, values = decomposed(target, 8)
    held = []
    for restored in (False, True):
        given = target, vectors, values, 10.0, bits * 8 * sum(shape)
        coded = code_product(*given, restored=restored)
        made = product(*coded.sides, coded.step, wide=shape[0] < shape[1])
        held.append(float((made * target).sum() / target.square().sum()))
    assert held[0] < 0.95 and held[1] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("bits", [150.0, 600.0, 3000.0])
def test_directions_of_single_large_values_take_their_bits(bits):
    """Each value of such a row costs as much as the largest: far more than Gaussian rows of the same energy do."""
    target = torch.zeros(60, 900)
    for i in range(8):
        target[7 * i, 100 * i] = 1e4 / (i + 1)
    vectors, values = decomposed(target, 8)
    coded = code_product(target, vectors, values, 0.1, bits)
    assert 0 < coded.bits <= bits
    made = product(*coded.sides, coded.step, wide=True)
    error = float((made - target).square().sum())
    assert coded.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_errors_are_told_of_every_size_of_values(scale):
    target = scale * normal(40, 60)
    vectors, values = decomposed(target, 40)
    bits = 4.0 * 40 * 100
    coded = code_product(target, vectors, values, scale, bits)
    exact = target.double()
    made = product(*coded.sides, coded.step / scale, wide=True).double() * scale
    error = float((made - exact).square().sum())
    assert coded.error == pytest.approx(error, rel=1e-2)
    rows = code_rows(target, scale, bits)
    made = rows.sides[0].values().double() * rows.step
    error = float((made - exact).square().sum())
    assert rows.error == pytest.approx(error, rel=1e-2)


def test_bits_without_end_cut_no_large_value_off():
    """Steps stay as coarse as the largest value of few asks for."""
    target = torch.zeros(40, 60)
    target[3], target[7, 5] = normal(1, 60)[0], 2e3
    vectors, values = decomposed(target, 2)
    bits = 64.0 * target.numel()
    for coded in (
        code_rows(target, 1e-3, bits),
        code_product(target, vectors, values, 1e-3, bits),
    ):
        assert coded.error < 1e-9 * float(target.square().sum())


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("bits", [30.0, 300.0])
def test_fitting_ends_whatever_the_sides_are(rows, bits):
    """A short side that takes all of the bits at one step and next to none at another."""
    target = torch.zeros(20, 4000)
    target[:rows] = normal(rows, 4000)
    target[10, 7] = 500.0
    vectors, values = decomposed(target, 4)
    for step in (1e-3, 0.3, 100.0):
        coded = code_product(target, vectors, values, step, bits)
        assert coded.bits <= bits


@pytest.mark.parametrize("bits", [40.0, 75.0, 160.0, 1000.0])
@pytest.mark.parametrize("sides", [(16, 1600), (20, 2000), (64, 640)])
def test_fitting_takes_few_tries_of_sparse_directions(monkeypatch, sides, bits):
    """Where single values take most of the bits, a longer step saves next to nothing until they are gone."""
    tries = []
    monkeypatch.setattr(
        coded_matrix, "quantize", lambda *args: tries.append(0) or quantize(*args)
    )
    target = torch.zeros(sides)
    for i in range(4):
        target[3 * i, 100 * i + 7] = 10.0 ** (4 - i)
    vectors, values = decomposed(target, 4)
    for step in (1e-2, 10.0, 1e4):
        tries.clear()
        coded = code_product(target, vectors, values, step, bits)
        assert coded.bits <= bits
        assert len(tries) < 80
        tries.clear()
        rows = code_rows(target, step, bits + CLASS_BITS * sides[0])
        assert rows.bits <= bits + CLASS_BITS * sides[0]
        assert len(tries) < 80


def test_rows_take_their_bits_and_tell_their_error():
    x = normal(40, 100) * torch.logspace(-1, 1, 40)[:, None]
    last = torch.inf
    for bits in (2000.0, 8000.0, 20000.0):
        coded = code_rows(x, 1.0, bits)
        assert 0.98 * bits < coded.bits <= bits
        (codes,) = coded.sides
        error = float((codes.values() * coded.step - x).square().sum())
        assert coded.error == pytest.approx(error, rel=1e-4)
        assert error < last
        last = error


@pytest.mark.parametrize("bits", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
def test_values_of_one_size_are_held_in_as_many_rows_as_fit(bits, quantizer):
    """No step holds some of them: all are above it together."""
    x = normal(64, 200).sign()
    given = CLASS_BITS * len(x) + bits * x.numel()
    coded = code_rows(x, 1.0, given, quantizer=quantizer)
    assert coded.bits <= given
    # tables of Gaussian values take some two bits for each of these
    assert coded.error < (1.02 - 0.4 * bits) * x.numel()


def test_rows_of_zero_are_coded_as_that():
    coded = code_rows(torch.zeros(5, 30), 1.0, 300.0)
    assert not coded.sides[0].any().any() and coded.error == 0


def test_one_step_for_all_rows_beats_one_width_for_all():
    """Reverse water-filling: rows of much energy get more bits than others."""
    x = normal(32, 400) * torch.logspace(-2, 0, 32)[:, None]
    coded = code_rows(x, 0.1, 2.0 * x.numel())
    even = x.square().sum() * 2.0 ** (-2 * 2.0)  # the Gaussian bound of two bits each
    assert coded.error < 0.5 * float(even)
