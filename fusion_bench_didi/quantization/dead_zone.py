"""Uniform quantization with entropy codes: one step for all rows of a matrix, a class of spread for each.

Rows are taken for Gaussian. The standard deviation of a row in steps is its class, which says where its cells end, by which
table of frequencies its numbers are coded, and what they stand for (``gaussian_tables.py``). One step for all is what
reverse water-filling asks for: rows of more energy get more bits, and every value is equally wrong. Such codes take 0.25 bits
per value more than the Gaussian bound at high rates, less at low ones (Gish and Pierce 1968). Rows that are coded along a
trellis (``trellis.py``) take two thirds of that back; their classes say so.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from . import trellis
from .entropy import StreamError, StreamReader, Table, encode_runs
from .gaussian_tables import (
    CLASSES,
    FIRST,
    LOWEST,
    PER_OCTAVE,
    RESTORED,
    TOP,
    TRELLIS,
    coded_class,
    dead_zone,
    gain,
    is_class,
    largest,
    lengths,
    low_bits,
    offset,
)
from .gaussian_tables import rate_distortion as rate_distortion_of_class
from .gaussian_tables import stretch, table, unrestored

#: How the numbers of rows are found: each by itself, or along a trellis.
Quantizer = Literal["scalar", "trellis"]
#: Error per bit that goes with a step, in squared steps.
SLOPES: dict[Quantizer, float] = {"scalar": math.log(2) / 6, "trellis": trellis.SLOPE}
#: Bits of a class.
CLASS_BITS = 8
#: Values that are decoded at a time.
BLOCK = 2**18
#: Values that are worked on at a time: what is made of them stays in a core's cache.
CACHED = 2**16


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

    def any(self) -> Tensor:
        """(r,) which rows stand for anything but zero."""
        return self.symbols.any(1) | (self.classes >= TRELLIS)

    def values(self) -> Tensor:
        """(r, n) float32 what they stand for, in steps."""
        found = self.symbols.new_empty(self.symbols.shape, dtype=torch.float32)
        for rows in _row_blocks(found):
            found[rows] = _stand_for(self.symbols[rows], self.classes[rows])
        return found

    @property
    def gains(self) -> Tensor:
        """(r,) by what values are longer than those of least squared error."""
        return gains_of(self.classes)

    def held(self, target: Tensor, step: float) -> Tensor:
        """(r,) part of the signal that is in what they stand for: its component along rows (r, n), over their length.

        Args:
            step: in the unit of the rows.
        """
        found = torch.empty_like(target[:, 0])
        for rows in _row_blocks(target):
            goal = target[rows] / step
            length = torch.linalg.vector_norm(goal, dim=1, keepdim=True)
            length.clamp_(min=torch.finfo(goal.dtype).tiny)
            values = _stand_for(self.symbols[rows], self.classes[rows])
            found[rows] = torch.linalg.vecdot(values / length, goal.div_(length))
        return found

    def restored(self, held: Tensor) -> "Codes":
        """The same numbers, for values as long as the signal where that brings them nearer to it.

        Rows that rounding shortens less than Gaussian ones, of few large values, are left as they are.

        Args:
            held: (r,) part of the signal that is in what they stand for.
        """
        gains = gains_of(self.classes + RESTORED)
        gains = gains.where(self.classes % TRELLIS < TOP, 1.0)
        nearer = (gains * held - 1).abs() < (held - 1).abs()
        return Codes(self.symbols, self.classes + (RESTORED * nearer).to(torch.uint8))

    def best_rows(self, target: Tensor, step: float, bits: float) -> "Codes":
        """The rows that hold most per bit, as many as take so many bits; the others stand for zero.

        Args:
            target: (r, n) what they stand for.
            step: in its unit.
        """
        low = _tables(self.symbols.device).low_bits[_index(self.classes)]
        taken = _lengths(self.symbols, self.classes).double().sum(1)
        taken += low * self.symbols.shape[1]
        goal = target / step
        gained = goal.square().sum(1) - (self.values() - goal).square().sum(1)
        order = (gained / taken.clamp(min=1e-9)).argsort(descending=True)
        fit = taken[order].cumsum(0) <= bits - CLASS_BITS * len(self)
        kept = torch.zeros_like(fit).scatter(0, order, fit & (gained[order] > 0))
        return Codes(self.symbols * kept[:, None], self.classes * kept)

    @property
    def bits(self) -> float:
        """Of classes and symbols; a stream takes up to 64 more."""
        tables = _tables(self.symbols.device)
        low = tables.low_bits[_index(self.classes)].sum()
        total = (CLASS_BITS * len(self) + low * self.symbols.shape[1]).double()
        for rows in _row_blocks(self.symbols):
            taken = _lengths(self.symbols[rows], self.classes[rows])
            total += taken.sum(dtype=torch.float64)
        return float(total)

    def squared_error(self, target: Tensor, step: float) -> float:
        """Of what they stand for, against rows (r, n) that are in the unit of the step."""
        total = 0.0
        for rows in _row_blocks(target):
            found = _stand_for(self.symbols[rows], self.classes[rows])
            error = found.sub_(target[rows], alpha=1 / step)
            norms = torch.linalg.vector_norm(error, dim=1).double()
            total += float(norms.square().sum())
        return total * step**2


def gains_of(classes: Tensor) -> Tensor:
    """(r,) float32 by what the values of rows of classes (r,) are longer than those of least squared error."""
    return _tables(classes.device).gains[classes.long()]


def quantize(rows: Tensor, step: float, quantizer: Quantizer = "scalar") -> Codes:
    """Codes of rows (r, n); a row of a few large values is of a higher class.

    Args:
        step: in the unit of the rows; below :func:`finest_step` the largest values are cut off.
        quantizer: along a trellis go the rows that lose less in fewer bits there, at one price of bits.
    """
    symbols = rows.new_empty(rows.shape, dtype=torch.int32)
    classes = rows.new_empty(len(rows), dtype=torch.uint8)
    for some in _row_blocks(rows):
        numbers, classes[some] = _quantized(rows[some] / step)
        symbols[some] = numbers  # what is behind the point is cut off
    if quantizer == "trellis":
        which = (classes >= FIRST).nonzero().squeeze(1)
        scaled, alone = rows[which] / step, Codes(symbols[which], classes[which])
        along = _along_trellis(scaled, alone.classes + TRELLIS)
        better = _costs(along, scaled) < _costs(alone, scaled)
        symbols[which[better]] = along.symbols[better]
        classes[which[better]] = along.classes[better]
    return Codes(symbols, classes)


def _along_trellis(scaled: Tensor, classes: Tensor) -> Codes:
    """Codes of rows (r, n) in steps, of classes (r,) along a trellis."""
    tables, index = _tables(scaled.device), _index(classes)

    def bits(numbers: Tensor, which: Tensor) -> Tensor:
        return _lengths(numbers, classes[which], dim=1)

    reach = tables.reach[index].int()
    numbers = trellis.best_paths(scaled, tables.stretch[index], reach, bits)
    return Codes(numbers, classes)


def _costs(codes: Codes, scaled: Tensor) -> Tensor:
    """(r,) error and bits of rows in steps; a trellis has no zero, and loses where most of a row is near it."""
    low = _tables(scaled.device).low_bits[_index(codes.classes)]
    bits = _lengths(codes.symbols, codes.classes).sum(1) + low * scaled.shape[1]
    return (codes.values() - scaled).square_().sum(1) + trellis.SLOPE * bits


def _lengths(symbols: Tensor, classes: Tensor, dim: int = 0) -> Tensor:
    """(r, n) float32 bits that symbols (r, n) take without their low bits.

    Args:
        dim: along which rows, of classes (r,), follow one another; (n, r) for 1.
    """
    places = _places(symbols, classes, dim)
    lengths = _tables(symbols.device).lengths
    return lengths.index_select(0, places.flatten()).view(places.shape)


def finest_step(rows: Tensor) -> float:
    """The smallest step at which the numbers of rows (r, n) are within those of the highest class."""
    if not rows.numel():
        return 0.0
    return float(torch.linalg.vector_norm(rows, torch.inf)) / _FARTHEST


def _quantized(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (r, n) that are to be cut off towards zero, in the place of rows in steps, and their classes (r,)."""
    tables = _tables(scaled.device)
    spread = scaled.square().mean(1).sqrt()
    octaves = spread.clamp(min=2.0**LOWEST).log2() - LOWEST
    classes = (octaves * PER_OCTAVE).round().long()
    farthest = torch.searchsorted(tables.reach[:CLASSES], scaled.abs().amax(1))
    classes = classes.maximum(farthest).clamp(max=CLASSES - 1)
    rounding = 0.5 - tables.dead_zones[classes][:, None]
    numbers = scaled.add_(torch.copysign(rounding, scaled))
    if _may_hold_any(farthest >= CLASSES):
        numbers.clamp_(-_FARTHEST, _FARTHEST)
    return numbers, classes


def rate_distortion(
    spread: Tensor, quantizer: Quantizer = "scalar"
) -> tuple[Tensor, Tensor]:
    """Bits per value and squared error per value, in squared steps, of Gaussian rows.

    Args:
        spread: standard deviations in steps, of any shape.
    """
    octaves = spread.double().clamp(min=2.0**LOWEST).log2() - LOWEST
    place = (octaves * PER_OCTAVE).clamp(max=CLASSES - 1)
    low = place.floor().clamp(max=CLASSES - 2).long()
    part, high = place - low, low + 1
    bits, error = (
        curve.take(low) * (1 - part) + curve.take(high) * part
        for curve in _curves(quantizer).to(spread.device)
    )
    nothing = spread < 2.0**LOWEST
    return bits.masked_fill(nothing, 0.0), error.where(
        ~nothing, spread.double().square()
    )


def encode(parts: Sequence[Codes]) -> Tensor:
    """(size,) uint8, the symbols of several matrices in one stream: part by part, class by class."""
    runs: list[tuple[Tensor, Table]] = []
    for codes in parts:
        numbers = codes.symbols.cpu()  # in one piece
        for spread, rows in _groups(codes.classes.cpu()):
            symbols, bits = numbers[rows], low_bits(spread)  # a copy
            low = []
            # the numbers nearest to a multiple of 2^bits have the same high bits
            if bits:
                symbols += 1 << bits >> 1
                low = [(symbols & ((1 << bits) - 1), 2**bits)]
                symbols >>= bits
            symbols += largest(coded_class(spread))
            runs += [(symbols, table(coded_class(spread))), *low]
    return encode_runs(runs)


def decode(stream: Tensor, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """(r, n) float32 per part, what the numbers that :func:`encode` was given stand for, in steps.

    Args:
        parts: classes (r,) and row length of each.

    Raises:
        StreamError: if the bytes are not those of such matrices.
    """
    made = [torch.empty(len(c), n, dtype=torch.float32, device="cpu") for c, n in parts]
    for part, rows, values in decode_blocks(stream.cpu(), parts):
        made[part][rows] = values
    return [values.to(stream.device) for values in made]


def decode_blocks(
    stream: Tensor, parts: Sequence[tuple[Tensor, int]], block: int = BLOCK
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As :func:`decode` some rows at a time: the part, indices (k,) of rows on the CPU, their values (k, n).

    Args:
        block: at most so many values at a time, one row at least.
    """
    reader, parts = StreamReader(stream), [(c.cpu(), n) for c, n in parts]
    for classes, _ in parts:
        for spread in torch.unique(classes).tolist():
            if not is_class(spread):
                raise StreamError(
                    f"{spread} is no class of spread; a later release may have more."
                )
    for part, (classes, n) in enumerate(parts):
        for spread, rows in _groups(classes):
            coded, bits = coded_class(spread), low_bits(spread)
            # low bits come after the high ones of all rows
            size = len(rows) if bits else max(block // max(n, 1), 1)
            for some in rows.split(size):
                shape = len(some), n
                places = reader.read(table(coded), len(some) * n)
                if spread < TOP:  # what they stand for is looked up at once
                    values = _values_of_class(spread).index_select(0, places)
                    values = _lengthened(values.view(shape), classes[some])
                else:
                    symbols = places - largest(coded)
                    if bits:
                        low = reader.read(2**bits, len(some) * n)
                        symbols = (symbols << bits) + low - (1 << bits >> 1)
                    values = Codes(symbols.view(shape), classes[some]).values()
                yield part, some, values.to(stream.device)
    reader.finish()


def _groups(classes: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Classes that are met, restored ones as if they were not, and indices of their rows."""
    classes = _tables(classes.device).unrestored[classes.long()]
    for spread in torch.unique(classes).tolist():
        yield spread, (classes == spread).nonzero().squeeze(1)


def _lengthened(values: Tensor, classes: Tensor) -> Tensor:
    """Values (r, n) of least squared error, in their place, as long as rows of classes (r,) are."""
    gains = gains_of(classes)
    return values.mul_(gains[:, None]) if _may_hold_any(gains != 1) else values


def _may_hold_any(which: Tensor) -> bool:
    """Whether any may be other than zero: on a CPU it is looked up; on an accelerator waiting for that takes longer than the work."""
    return which.device.type != "cpu" or bool(which.any())


def _row_blocks(rows: Tensor) -> Iterator[slice]:
    """Rows of a matrix (r, n), few enough for what is made of them to stay in a core's cache."""
    cpu, (r, n) = rows.device.type == "cpu", rows.shape
    size = max(CACHED // max(n, 1), 1) if cpu else max(r, 1)
    return (slice(i, i + size) for i in range(0, r, size))


def _places(symbols: Tensor, classes: Tensor, dim: int = 0) -> Tensor:
    """(r, n) int32, where the symbols without their low bits stand in the tables of all classes one after another."""
    tables, classes = _tables(symbols.device), _index(classes).unsqueeze(1 - dim)
    low = tables.low_bits[classes]
    if _may_hold_any(low):
        symbols = (symbols + tables.half_steps[classes]) >> low
    return symbols + tables.middles[classes]


def _stand_for(symbols: Tensor, classes: Tensor) -> Tensor:
    """(r, n) float32 what symbols (r, n) of rows of some classes stand for, in steps."""
    plain = _tables(symbols.device).unrestored[classes.long()]
    return _lengthened(_of_least_error(symbols, plain), classes)


def _of_least_error(symbols: Tensor, classes: Tensor) -> Tensor:
    """As :func:`_stand_for`, of classes that are not restored."""
    tables, highest = _tables(symbols.device), int(classes.max()) if len(classes) else 0
    if highest < TOP:
        places = _places(symbols, classes)
        return tables.values.index_select(0, places.flatten()).view(places.shape)
    if highest < TRELLIS:
        return _farther(symbols, tables.offsets[classes.long()])
    found, along = torch.empty_like(symbols, dtype=torch.float32), classes >= TRELLIS
    stretched = tables.stretch[_index(classes[along])]
    found[along] = trellis.values(symbols[along], stretched)
    found[~along] = _of_least_error(symbols[~along], classes[~along])
    return found


def _index(classes: Tensor) -> Tensor:
    """(r,) where classes stand in tables of all of them: those along a trellis come last, restored ones are as if they were not."""
    classes = _tables(classes.device).unrestored[classes.long()].long()
    return classes - (classes >= TRELLIS) * (TRELLIS + FIRST - CLASSES)


def _farther(symbols: Tensor, offsets: Tensor) -> Tensor:
    """(r, n) float32 symbols, farther from zero by one offset for 1 and by another for what is larger, (r, 2)."""
    farther = torch.where(symbols.abs() == 1, offsets[:, :1], offsets[:, 1:])
    return symbols + symbols.sign() * farther


def _reach(spread: int) -> float:
    """The largest number of rows of a class."""
    bits = low_bits(spread)
    return float((largest(coded_class(spread)) << bits) - (bits > 0))


_FARTHEST = _reach(CLASSES - 1)


@dataclass(frozen=True)
class _Tables:
    """What the classes are made of, on one device; C of them, those along a trellis last.

    Args:
        offsets: (CLASSES, 2) how much farther from zero the values of 1 and of larger numbers are than themselves.
        dead_zones: (CLASSES,).
        stretch: (C,) by how much more than itself a value along a trellis stands for.
        reach: (C,) the largest numbers, ascending in the first CLASSES.
        low_bits: (C,) int32.
        half_steps: (C,) int32, half of the number that has one bit more.
        middles: (C,) int32 where 0 stands in the two tables below.
        lengths: float32 bits that the symbols of each class without low bits take, one class after another.
        values: float32 what these symbols stand for, in steps, but for those along a trellis.
        unrestored: (256,) uint8 the class without restoring.
        gains: (256,) by what values are multiplied after all.
    """

    offsets: Tensor
    dead_zones: Tensor
    stretch: Tensor
    reach: Tensor
    low_bits: Tensor
    half_steps: Tensor
    middles: Tensor
    lengths: Tensor
    values: Tensor
    unrestored: Tensor
    gains: Tensor


@lru_cache(maxsize=None)
def _tables(device: torch.device) -> _Tables:
    floats = partial(torch.tensor, dtype=torch.float32, device=device)
    integers = partial(torch.tensor, dtype=torch.int32, device=device)
    scalar = range(CLASSES)
    every = [*scalar, *range(TRELLIS + FIRST, TRELLIS + CLASSES)]
    low = [low_bits(c) for c in every]
    coded = [*range(TOP), *range(TRELLIS + FIRST, TRELLIS + TOP)]
    ends = accumulate(2 * largest(c) + 1 for c in coded)
    starts = dict(zip(coded, [0, *ends]))
    middles = [starts[coded_class(c)] + largest(coded_class(c)) for c in every]
    return _Tables(
        floats([offset(c) for c in scalar]),
        floats([float(dead_zone(c)) for c in scalar]),
        floats([stretch(c - TRELLIS) if c >= TRELLIS else 0.0 for c in every]),
        floats([_reach(c) for c in every]),
        integers(low),
        integers([1 << bits >> 1 for bits in low]),
        integers(middles),
        torch.cat([lengths(c) for c in coded]).float().to(device),
        torch.cat([_values_of_class(c) for c in range(TOP)]).to(device),
        torch.tensor([unrestored(c) for c in range(256)], dtype=torch.uint8).to(device),
        floats([gain(c) if is_class(c) else 1.0 for c in range(256)]),
    )


@lru_cache(maxsize=None)
def _values_of_class(spread: int) -> Tensor:
    """(2 L + 1,) float32, what the numbers -L to L of a class without low bits stand for, in steps."""
    most = largest(spread)
    symbols = torch.arange(-most, most + 1, dtype=torch.int32)[None]
    offsets = torch.tensor([offset(spread)], dtype=torch.float32)
    return _farther(symbols, offsets)[0]


@lru_cache(maxsize=None)
def _curves(quantizer: Quantizer) -> Tensor:
    """(2, CLASSES) bits and squared error per value, float64."""
    along = [TRELLIS * (quantizer == "trellis" and c >= FIRST) for c in range(CLASSES)]
    points = [rate_distortion_of_class(c + more) for c, more in enumerate(along)]
    return torch.tensor(points, dtype=torch.float64).mT.contiguous()
