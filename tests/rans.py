"""Streams read by definition, as documented: the range variant of asymmetric numeral systems, one symbol after another."""

from collections.abc import Callable, Sequence

_SHARES = 2**24


def edges_of(table: Sequence[int]) -> list[int]:
    """Where the symbols of a table of frequencies begin, in shares of 2^-24, and where the last one ends."""
    edges, total = [0], 0
    for i, weight in enumerate(table):
        total += weight
        share = total * ((_SHARES - len(table)) / sum(table))
        edges.append(int(share) + i + 1)
    return [*edges[:-1], _SHARES]


def reader(stream: bytes) -> Callable[[Sequence[int]], int]:
    """What reads the next symbol, of the edges of its table; states are of 64 bits, words of 32."""
    words = [int.from_bytes(stream[i : i + 4], "little") for i in range(0, len(stream), 4)]  # fmt: skip
    state = 0
    for _ in range(min(2, len(words))):
        state = state << 32 | words.pop()

    def read(edges: Sequence[int]) -> int:
        nonlocal state
        place = state % _SHARES
        symbol = next(i for i, edge in enumerate(edges[1:]) if place < edge)
        width = edges[symbol + 1] - edges[symbol]
        state = (state >> 24) * width + place - edges[symbol]
        if state < 2**32 and words:
            state = state << 32 | words.pop()
        return symbol

    return read
