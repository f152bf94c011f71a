"""Entropy coding of small integers: asymmetric numeral systems under a static table of frequencies, by ``constriction``.

A stream takes the entropy of the table and a few bytes more. The table is stored with it: 16 bits per symbol, relative to the
most frequent one; 0 is a symbol that does not occur.
"""

from collections.abc import Sequence

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
    return decode_runs(stream, [(table, numel)])[0]


def decode_runs(stream: Tensor, runs: Sequence[tuple[Table, int]]) -> list[Tensor]:
    """The symbols that :func:`encode_runs` was given, int32, of tables and lengths.

    Raises:
        StreamError: if the bytes are not those of such runs.
    """
    if stream.numel() % 4:
        raise StreamError(f"A coded stream of {stream.numel()} bytes is cut short.")
    words = stream.cpu().numpy().view("<u4").astype(np.uint32)
    found = []
    try:
        coder = constriction.stream.stack.AnsCoder(words)
        for table, numel in runs:
            none = np.empty(0, np.int32)
            found.append(coder.decode(_model(table), numel) if numel else none)
    except ValueError as error:
        raise StreamError(f"A coded stream cannot be read: {error}.") from error
    if not coder.is_empty():
        numel = sum(numel for _, numel in runs)
        raise StreamError(f"A coded stream does not end after {numel} symbols.")
    return [torch.from_numpy(symbols) for symbols in found]


def _model(table: Table):
    if isinstance(table, int):
        return constriction.stream.model.Uniform(table)
    weights = table.cpu().to(torch.float64).numpy()
    if len(weights) < 2 or not weights.any():
        raise StreamError(f"A table of frequencies is {table.tolist()}.")
    return constriction.stream.model.Categorical(weights, perfect=False)
