"""Uniform quantization with entropy codes: one step for all rows of a matrix, a class of spread for each.

Rows are taken for Gaussian. The standard deviation of a row in steps is its class, which says where its cells end, by which
table of frequencies its numbers are coded, and what they stand for (``gaussian_tables.py``). One step for all is what
reverse water-filling asks for: rows of more energy get more bits, and every value is equally wrong. Such codes take 0.25 bits
per value more than the Gaussian bound at high rates, less at low ones (Gish and Pierce 1968).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .entropy import StreamError, StreamReader, Table, encode_runs
from .gaussian_tables import (
    CLASSES,
    LOWEST,
    PER_OCTAVE,
    coded_class,
    dead_zone,
    largest,
    lengths,
    low_bits,
    offset,
)
from .gaussian_tables import rate_distortion as rate_distortion_of_class
from .gaussian_tables import table

#: Error per bit that goes with a step, in squared steps.
SLOPE = math.log(2) / 6
#: Bits of a class.
CLASS_BITS = 8
#: Values that are decoded at a time.
BLOCK = 2**18


@dataclass(frozen=True)
class Codes:
    """Rows as whole numbers.

    Args:
        symbols: (r, n) int32.
        classes: (r,) uint8.
    """

    symbols: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, which: Tensor) -> "Codes":
        """Some of the rows."""
        return Codes(self.symbols[which], self.classes[which])

    def values(self) -> Tensor:
        """(r, n) float32 what they stand for, in steps."""
        farther = _offsets(self.symbols.device)[self.classes.long()]  # (r, 2)
        farther = torch.where(self.symbols.abs() == 1, farther[:, :1], farther[:, 1:])
        return self.symbols + self.symbols.sign() * farther

    @property
    def bits(self) -> float:
        """Of classes and symbols; a stream takes up to 64 more."""
        total = float(CLASS_BITS * len(self))
        for spread, rows in _groups(self.classes):
            high, low = _split(self.symbols[rows], spread)
            code = lengths(coded_class(spread)).to(high.device)
            total += float(code[high.long()].sum()) + low_bits(spread) * low.numel()
        return total


def quantize(rows: Tensor, step: float) -> Codes:
    """Codes of rows (r, n); nothing is cut off, for a row of a few large values is of a higher class.

    Args:
        step: in the unit of the rows.
    """
    scaled = rows / step
    spread, reach = scaled.square().mean(1).sqrt(), _reach(rows.device)
    octaves = spread.clamp(min=2.0**LOWEST).log2() - LOWEST
    classes = (octaves * PER_OCTAVE).round().long()
    farthest = torch.searchsorted(reach, scaled.abs().amax(1))
    classes = classes.maximum(farthest).clamp(max=CLASSES - 1)
    rounding = 0.5 - _dead_zones(rows.device)[classes][:, None]
    size = scaled.add_(torch.copysign(rounding, scaled)).trunc_()
    most = reach[classes][:, None]
    symbols = size.clamp_(-most, most).to(torch.int32)
    return Codes(symbols, classes.to(torch.uint8))


def rate_distortion(spread: Tensor) -> tuple[Tensor, Tensor]:
    """Bits per value and squared error per value, in squared steps, of Gaussian rows.

    Args:
        spread: standard deviations in steps, of any shape.
    """
    octaves = spread.double().clamp(min=2.0**LOWEST).log2() - LOWEST
    place = (octaves * PER_OCTAVE).clamp(max=CLASSES - 1)
    low = place.floor().clamp(max=CLASSES - 2).long()
    part, curves = place - low, _curves().to(spread.device)
    bits, error = curves[:, low] * (1 - part) + curves[:, low + 1] * part
    nothing = spread < 2.0**LOWEST
    return bits.masked_fill(nothing, 0.0), error.where(
        ~nothing, spread.double().square()
    )


def encode(parts: Sequence[Codes]) -> Tensor:
    """(size,) uint8, the symbols of several matrices in one stream: part by part, class by class."""
    runs: list[tuple[Tensor, Table]] = []
    for codes in parts:
        for spread, rows in _groups(codes.classes):
            high, low = _split(codes.symbols[rows], spread)
            runs.append((high, table(coded_class(spread))))
            if low_bits(spread):
                runs.append((low, 2 ** low_bits(spread)))
    return encode_runs(runs)


def decode(stream: Tensor, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """(r, n) float32 per part, what the numbers that :func:`encode` was given stand for, in steps.

    Args:
        parts: classes (r,) and row length of each.

    Raises:
        StreamError: if the bytes are not those of such matrices.
    """
    made = [torch.empty(len(c), n, device=stream.device) for c, n in parts]
    for part, rows, values in decode_blocks(stream, parts):
        made[part][rows.to(stream.device)] = values
    return made


def decode_blocks(
    stream: Tensor, parts: Sequence[tuple[Tensor, int]], block: int = BLOCK
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As :func:`decode` some rows at a time: the part, indices (k,) of rows on the CPU, their values (k, n).

    Args:
        block: at most so many values at a time, one row at least.
    """
    reader, parts = StreamReader(stream), [(c.cpu(), n) for c, n in parts]
    for classes, _ in parts:
        if bool((classes >= CLASSES).any()):
            raise StreamError(f"Classes of spread go to {CLASSES - 1}.")
    for part, (classes, n) in enumerate(parts):
        for spread, rows in _groups(classes):
            frequencies, bits = table(coded_class(spread)), low_bits(spread)
            if bits:  # which come after those of all rows
                high = reader.read(frequencies, len(rows) * n)
                low = reader.read(2**bits, len(rows) * n)
                high = (high - largest(coded_class(spread))) << bits
                symbols = (high + low - (1 << bits >> 1)).view(len(rows), n)
                yield part, rows, Codes(symbols, classes[rows]).values().to(
                    stream.device
                )
                continue
            known = _values(spread)
            for some in rows.split(max(block // max(n, 1), 1)):
                values = known.index_select(0, reader.read(frequencies, len(some) * n))
                yield part, some, values.view(len(some), n).to(stream.device)
    reader.finish()


@lru_cache(maxsize=None)
def _values(spread: int) -> Tensor:
    """(2 L + 1,) float32, what the numbers -L to L of a class without low bits stand for, in steps."""
    most = largest(spread)
    symbols = torch.arange(-most, most + 1, dtype=torch.int32)[None]
    return Codes(symbols, torch.tensor([spread])).values()[0]


def _groups(classes: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Classes that are met, and indices of their rows."""
    for spread in torch.unique(classes).tolist():
        yield spread, (classes == spread).nonzero().squeeze(1)


def _split(symbols: Tensor, spread: int) -> tuple[Tensor, Tensor]:
    """Symbols as indices of the table of their class, and their lowest bits; none of either sign is favored."""
    bits = low_bits(spread)
    moved = symbols + (1 << bits >> 1)
    return (moved >> bits) + largest(coded_class(spread)), moved & ((1 << bits) - 1)


@lru_cache(maxsize=None)
def _offsets(device: torch.device) -> Tensor:
    """(CLASSES, 2) how much farther from zero the values of 1 and of larger numbers are than themselves."""
    return torch.tensor([offset(c) for c in range(CLASSES)], device=device)


@lru_cache(maxsize=None)
def _dead_zones(device: torch.device) -> Tensor:
    """(CLASSES,)."""
    zones = [float(dead_zone(c)) for c in range(CLASSES)]
    return torch.tensor(zones, device=device)


@lru_cache(maxsize=None)
def _reach(device: torch.device) -> Tensor:
    """(CLASSES,) the largest numbers, ascending."""
    most = [
        (largest(coded_class(c)) << low_bits(c)) - (low_bits(c) > 0)
        for c in range(CLASSES)
    ]
    return torch.tensor(most, dtype=torch.float32, device=device)


@lru_cache(maxsize=None)
def _curves() -> Tensor:
    """(2, CLASSES) bits and squared error per value, float64."""
    points = [rate_distortion_of_class(c) for c in range(CLASSES)]
    return torch.tensor(points, dtype=torch.float64).mT.contiguous()
