"""Entropy-coded streams: short, exact, read by an independent decoder, and refused where they are damaged."""

import random

import pytest
import torch
from helpers import ideal_bits
from rans import edges_of, reader
from torch import Tensor

from fusion_bench_didi.quantization.entropy import (
    StreamError,
    decode,
    encode,
    frequencies,
)


def drawn(shares: list[float], count: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    weights = torch.tensor(shares, dtype=torch.float64)
    return torch.multinomial(weights, count + 1, True, generator=g)[:count]


SOURCES = {
    "even": [1, 1],
    "rare": [0.99, 0.01],
    "ternary": [0.02, 0.96, 0.02],
    "sixteen": [1 / 16] * 16,
    "gap": [0.5, 0, 0.5],
    "one": [0, 1, 0],
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("count", [0, 1, 7, 20000])
def test_streams_come_back_and_are_as_short_as_their_entropy(source, count):
    shares = SOURCES[source]
    symbols = drawn(shares, count)
    table = frequencies(symbols, len(shares))
    stream = encode(symbols, table)
    assert stream.dtype == torch.uint8 and table.dtype == torch.uint16
    assert torch.equal(decode(stream, table, count), symbols.int())
    assert 8 * len(stream) <= 1.001 * ideal_bits(symbols, len(shares)) + 64


def test_entropy_of_known_symbols():
    assert ideal_bits(torch.tensor([[0, 1], [2, 3]]), 4) == pytest.approx(8)
    assert ideal_bits(torch.tensor([1, 1, 1]), 2) == 0
    assert ideal_bits(torch.tensor([0, 1, 1, 1]), 2) == pytest.approx(3.2451125)


@pytest.mark.parametrize("source", SOURCES)
def test_an_independent_decoder_reads_them(source):
    symbols = drawn(SOURCES[source], 500)
    table = frequencies(symbols, len(SOURCES[source]))
    stream = encode(symbols, table).numpy().tobytes()
    read, edges = reader(stream), edges_of(table.tolist())
    assert [read(edges) for _ in range(500)] == symbols.tolist()


def test_the_bytes_of_a_stream_are_those_of_the_first_release():
    symbols = torch.arange(60) % 7 % 5 % 3
    table = frequencies(symbols, 3)
    assert table.tolist() == [65535, 63014, 22685]
    assert (
        encode(symbols, table).numpy().tobytes().hex()
        == "acf8644e3fede84b3ce54a5ac90b0000"
    )


def test_damaged_streams_are_refused():
    symbols = drawn([0.9, 0.05, 0.05], 3000)
    table = frequencies(symbols, 3)
    stream = encode(symbols, table)
    draw = random.Random(0)
    for _ in range(100):
        damaged = stream.clone()
        damaged[draw.randrange(len(stream))] ^= 1 << draw.randrange(8)
        with pytest.raises(StreamError):
            decode(damaged, table, 3000)
    for damaged in (stream[:-1], stream[:-4], stream[4:], stream.new_zeros(8)):
        with pytest.raises(StreamError):
            decode(damaged, table, 3000)
    for few in (table[:0], table[:1], torch.zeros_like(table)):
        with pytest.raises(StreamError, match="table"):
            decode(stream, few, 3000)
