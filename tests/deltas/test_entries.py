"""Entries as codes between two ends, at positions or at random, against decoders written from the formulas."""

import pytest
import torch
from helpers import ideal_bits

from fusion_bench_didi.deltas.entries import (
    CODE_WIDTHS,
    ScatteredDelta,
    SeededDelta,
    UniformDelta,
    between_ends,
    drawn,
    signs,
)
from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.quantization.counters import random_words, seed_of

M64 = 2**64 - 1


def split_mix(seed: int, count: int) -> list[int]:
    """SplitMix64 one number after the other, in Python's integers."""
    found, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & M64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & M64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & M64
        found.append(z ^ (z >> 31))
    return found


def test_the_generator_is_split_mix():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert split_mix(1234567, 3) == known
    for seed in (0, 1, 1234567, 2**32 - 1, 2**63 + 5):
        words = random_words(seed, 1000)
        assert words.tolist() == [z >> 32 for z in split_mix(seed, 1000)]
    assert random_words(1, 0).shape == (0,)


@pytest.mark.parametrize("share", [0.003, 0.03, 0.5])
def test_entries_are_drawn_at_their_share_and_independently_of_the_seed(share):
    n, keep = 200_000, round(share * 2**32)
    first, second = drawn(1, keep, n), drawn(2, keep, n)
    spread = (share * (1 - share) / n) ** 0.5
    assert abs(first.double().mean() - share) < 4 * spread
    both = share**2
    assert abs((first & second).double().mean() - both) < 4 * (both / n) ** 0.5
    after = (first[1:] & first[:-1]).double().mean()
    assert abs(after - both) < 4 * (both / n) ** 0.5


def test_all_and_no_entries_can_be_drawn():
    assert drawn(3, 2**32, 1000).all() and not drawn(3, 0, 1000).any()


def test_seeds_are_told_by_names():
    seeds = {seed_of(0, task, name) for task in "abc" for name in ("x", "y", "ab")}
    assert len(seeds) == 9 and all(0 < seed < 2**32 for seed in seeds)
    assert seed_of("a", "bc") != seed_of("ab", "c")
    assert seed_of(0, "mnist", "fc1.weight") == 1354518291


def bits_of(packed: torch.Tensor, width: int, count: int) -> list[int]:
    """Fields of ``width`` bits, low ones first, out of one large number."""
    number = int.from_bytes(packed.numpy().tobytes(), "little")
    return [number >> width * i & (2**width - 1) for i in range(count)]


def value(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3


@pytest.mark.parametrize("width", CODE_WIDTHS)
@pytest.mark.parametrize("shape", [(), (1,), (7, 9), (4, 3, 2, 2)])
def test_uniform(width, shape):
    tau = value(*shape)
    delta = UniformDelta.of(*between_ends(tau, width), width)
    lo, hi = float(tau.min()), float(tau.max())
    step = (hi - lo) / (2**width - 1)
    codes = torch.tensor(bits_of(delta.codes, width, tau.numel())).view(shape)
    torch.testing.assert_close(delta.own(), (lo + codes * step).float())
    assert float((delta.own() - tau).abs().max()) <= step / 2 * (1 + 1e-4) + 1e-9
    assert delta.bits == 8 * -(-width * tau.numel() // 8) + 64


def test_signs_are_of_one_bit():
    tau = torch.tensor([[-1.0, 0.0], [2.0, -0.5]])
    delta = UniformDelta.of(*signs(tau, 0.25), 1)
    assert delta.own().tolist() == [[-0.25, 0.25], [0.25, -0.25]]
    assert delta.bits == 8 + 64


@pytest.mark.parametrize("share", [0.0, 0.02, 0.6, 1.0])
@pytest.mark.parametrize("width", [1, 4, 16])
def test_scattered(width, share):
    tau, kept = value(60, 70), drawn(5, round(share * 2**32), 4200).view(60, 70)
    values, ends = tau[kept].half(), None
    if width < 16:
        some = tau[kept] if kept.any() else tau.new_zeros(1)
        values, ends = between_ends(some, width)
        values = values[: int(kept.sum())]
    delta = ScatteredDelta.of(kept, values, ends, width)
    expected, codes = torch.zeros(60, 70), bits_of(delta.values, width, len(values))
    for i, place in enumerate(kept.flatten().nonzero().flatten().tolist()):
        if ends is None:
            expected.view(-1)[place] = values[i].float()
        else:
            lo, hi = ends.tolist()
            expected.view(-1)[place] = lo + codes[i] * (hi - lo) / (2**width - 1)
    torch.testing.assert_close(delta.own(), expected, rtol=1e-5, atol=1e-9)
    own = width * len(values) + ideal_bits(kept.int(), 2) + 32 + 64 * (width < 16)
    assert own <= delta.bits <= 1.001 * own + 72


@pytest.mark.parametrize("width", [2, 16])
def test_seeded(width):
    tau, keep = value(60, 70), round(0.1 * 2**32)
    kept = torch.tensor([z >> 32 < keep for z in split_mix(9, 4200)]).view(60, 70)
    values, ends = tau[kept].half(), None
    if width < 16:
        values, ends = between_ends(tau[kept], width)
    delta = SeededDelta.of((60, 70), values, ends, width, seed=9, keep=keep)
    found = delta.own()
    assert torch.equal(found != 0, kept)
    if ends is None:
        assert torch.equal(found[kept], values.float())
    assert delta.bits == 8 * -(-width * int(kept.sum()) // 8) + 64 * (width < 16)


def test_values_that_are_not_those_of_the_positions_are_refused():
    tau, kept = value(6, 7), drawn(5, 2**30, 42).view(6, 7)
    for count in (0, 1, 42):
        values = torch.zeros(count).half()
        for delta in (
            ScatteredDelta.of(kept, values, None, 16),
            SeededDelta.of((6, 7), values, None, 16, seed=5, keep=2**30),
        ):
            with pytest.raises(CheckpointMismatchError, match="stored values"):
                delta.own()
