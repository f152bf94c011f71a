"""Entropy coding of small integers: asymmetric numeral systems under a static table of frequencies, by ``constriction``.

A stream takes the entropy of the table and a few bytes more. The table is stored with it: 16 bits per symbol, relative to the
most frequent one; 0 is a symbol that does not occur.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import constriction
import numpy as np
import torch
from torch import Tensor

from ..errors import DiDiError

_LARGEST = 2**16 - 1
#: Frequencies (alphabet,) uint16, or the size of an alphabet whose symbols are equally likely.
Table = Tensor | int


class StreamError(DiDiError):
    """Bytes that no symbols were coded into under their table."""


def frequencies(symbols: Tensor, alphabet: int) -> Tensor:
    """(alphabet,) uint16, how often each symbol occurs relative to the most frequent one.

    Args:
        symbols: integers of any shape in ``[0, alphabet)``.
        alphabet: two at least.
    """
    counts = torch.bincount(symbols.flatten().cpu(), minlength=alphabet).double()
    table = (counts * (_LARGEST / counts.max().clamp(min=1))).round()
    return table.clamp(min=1).where(counts > 0, 0.0).to(torch.uint16)


def encode(symbols: Tensor, table: Table) -> Tensor:
    """Symbols as bytes, (size,) uint8.

    Args:
        symbols: integers of any shape, indices of the table.
        table: (alphabet,) uint16 by :func:`frequencies`; none that occurs is 0.
    """
    return encode_runs([(symbols, table)])


def encode_runs(runs: Sequence[tuple[Tensor, Table]]) -> Tensor:
    """Runs of symbols, each under its own table, as the bytes of one stream."""
    coder = constriction.stream.stack.AnsCoder()
    for symbols, table in reversed(runs):  # what is coded last is read first
        flat = symbols.flatten().to("cpu", torch.int32).numpy()
        if len(flat):
            coder.encode_reverse(flat, _model(table))
    words = coder.get_compressed()
    return torch.from_numpy(words.astype("<u4").view(np.uint8).copy())


def decode(stream: Tensor, table: Table, numel: int) -> Tensor:
    """(numel,) int32, the symbols that :func:`encode` was given.

    Raises:
        StreamError: if the bytes are not those of so many symbols under the table.
    """
    reader = StreamReader(stream)
    found = reader.read(table, numel)
    reader.finish()
    return found


class StreamReader:
    """Symbols of a stream, one after another; a run may be read in parts.

    Args:
        stream: (size,) uint8.

    Raises:
        StreamError: if the bytes are no stream.
    """

    def __init__(self, stream: Tensor):
        if stream.numel() % 4:
            raise StreamError(f"A coded stream of {stream.numel()} bytes is cut short.")
        words = stream.cpu().numpy().view("<u4").astype(np.uint32)
        self._models: dict[int, Any] = {}
        self._read = 0
        with _readable():
            self._coder = constriction.stream.stack.AnsCoder(words)

    def read(self, table: Table, numel: int) -> Tensor:
        """(numel,) int32.

        Raises:
            StreamError: if the bytes are not those of such symbols.
        """
        if not numel:
            return torch.empty(0, dtype=torch.int32)
        key = table if isinstance(table, int) else id(table)
        with _readable():
            if key not in self._models:
                self._models[key] = table, _model(table)
            found = self._coder.decode(self._models[key][1], numel)
        self._read += numel
        return torch.from_numpy(found)

    def finish(self) -> None:
        """Raises a StreamError if there is more."""
        if not self._coder.is_empty():
            raise StreamError(
                f"A coded stream does not end after {self._read} symbols."
            )


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise StreamError(f"A coded stream cannot be read: {error}.") from error


def _model(table: Table):
    if isinstance(table, int):
        return constriction.stream.model.Uniform(table)
    weights = table.cpu().to(torch.float64).numpy()
    if len(weights) < 2 or not weights.any():
        raise StreamError(f"A table of frequencies is {table.tolist()}.")
    return constriction.stream.model.Categorical(weights, perfect=False)
