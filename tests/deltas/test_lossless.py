"""Tensors that come back to the last bit."""

import zlib

import pytest
import torch

from fusion_bench_didi.deltas.lossless import LosslessDelta
from fusion_bench_didi.errors import CheckpointMismatchError

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ODD = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3e38, -3e38, float("inf"), -float("inf")]


def value(count: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=g, dtype=torch.float64)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_bit_comes_back(dtype):
    odd = torch.tensor(ODD, dtype=torch.float64)
    grid = torch.cartesian_prod(odd, odd)
    base = torch.cat([value(56, 0), grid[:, 0]]).to(dtype).view(12, 13)
    tuned = torch.cat([value(56, 1), grid[:, 1]]).to(dtype).view(12, 13)
    delta = LosslessDelta.of(tuned, base)
    assert bits(delta.applied(base)).equal(bits(tuned))
    assert bits(delta.applied(base.double())).equal(
        bits(tuned)
    ), "of a wider base model"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (1, 2), (0,), (3, 0)])
def test_tensors_of_few_entries_come_back(shape, dtype):
    count = torch.Size(shape).numel()
    base, tuned = (value(count, seed).to(dtype).view(shape) for seed in (0, 1))
    assert bits(LosslessDelta.of(tuned, base).applied(base)).equal(bits(tuned))


def test_an_independent_decoder_reads_it():
    base, tuned = value(9, 0).float(), value(9, 1).float()
    tuned[3] = base[3]
    planes = zlib.decompress(LosslessDelta.of(tuned, base).stream.numpy().tobytes())
    for i in range(9):
        folded = sum(planes[9 * k + i] << 8 * k for k in range(4))
        difference = -(folded + 1) // 2 if folded % 2 else folded // 2

        def place(x: torch.Tensor) -> int:
            word = int(x.view(torch.int32)) & (2**32 - 1)
            return word if word < 2**31 else 2**31 - 1 - word

        assert (place(base[i]) + difference - place(tuned[i])) % 2**32 == 0
        assert (difference == 0) == (i == 3)


def test_small_changes_take_less():
    base = value(20000, 0).float()
    sizes = [
        LosslessDelta.of(base + scale * value(20000, 1).float(), base).bits / 20000
        for scale in (1e-5, 1e-3, 1.0)
    ]
    assert sizes == sorted(sizes) and sizes[0] < 14 and sizes[2] < 33


def test_damaged_streams_are_refused():
    base = value(200, 0).float()
    delta = LosslessDelta.of(base + 1e-3, base)
    other = LosslessDelta.of(value(201, 0).float(), value(201, 1).float())
    short = LosslessDelta.of(base[:-1] + 1e-3, base[:-1])
    for stream in (delta.stream[:-4], delta.stream[4:], other.stream, short.stream):
        damaged = LosslessDelta(delta.shape, stream, delta.like)
        with pytest.raises(CheckpointMismatchError, match="compressed tensor"):
            damaged.applied(base)
