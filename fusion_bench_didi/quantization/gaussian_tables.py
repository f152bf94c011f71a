"""Tables of frequencies for the whole numbers that Gaussian values become, by class of spread, the same on every machine.

A class is a standard deviation in steps, to a quarter of an octave. Its numbers are ``k = sign(x) floor(|x| + 1/2 - d)``; the
dead zone d makes the cell of zero wider where spreads are small, which spends no bits on what they do not pay for. From the
spread of :data:`TOP` on the lowest bits of a number are as good as random: they are written as they are, and what is left is
of one of the four classes below.

Rows that are coded along a trellis (``trellis.py``) have classes of their own, :data:`TRELLIS` more: the numbers of both codebooks
are those of a Gaussian at ``k + 1/4``, and somewhat smaller, for small ones take fewer bits.

Values of least squared error are too short: of a row that loses a part d of its energy, ``1 - d`` of the signal is left. Rows
that are restored have classes of their own too, :data:`RESTORED` more: their values are as long as the signal, ``1 / (1 - d)`` times.

Readers of files have to come to the same whole numbers as their writers, so that tables are made in decimal arithmetic.
"""

import math
from decimal import Decimal, localcontext
from functools import lru_cache

import torch
from torch import Tensor

#: Classes per octave of the spread, that of class 0 in octaves, and the class from which numbers have random low bits.
PER_OCTAVE, LOWEST, TOP = 4, -2, 20
#: Classes there are, up to spreads of 2^17 steps.
CLASSES = 77
#: Added to the class of a row that is coded along a trellis, and the first class to which that pays.
TRELLIS, FIRST = 128, 3
#: Of classes from FIRST to TOP along a trellis, measured on Gaussian numbers: standard deviation in the table over that of the row
#: in hundredths; by how many thousandths values stand for more than themselves; bits and squared error per value in 10,000ths.
_ALONG = (
    (73, -210, 7957, 665),
    (81, -140, 10414, 669),
    (86, -90, 12846, 675),
    (89, -55, 15266, 683),
    (92, -30, 17730, 686),
    (94, -15, 20217, 688),
    (95, -5, 22719, 688),
    (96, 5, 25172, 692),
    (97, 5, 27741, 685),
    (98, 0, 30358, 674),
    (99, 0, 32896, 670),
    (99, 0, 35420, 669),
    (99, 0, 37939, 667),
    (100, 0, 40455, 666),
    (100, 0, 42965, 665),
    (100, 0, 45472, 664),
    (100, 0, 47977, 664),
)
#: Squared error per value along a trellis, in squared steps, where spreads are large.
_FINE = 0.0664
#: Added to the class of a row whose values are as long as the signal, which classes below TOP can be, and how much longer at most.
RESTORED, MOST_GAIN = CLASSES, 2.0
#: How far the symbols of a table go: so many spreads and so many more; 16 bits each where no Gaussian value would be.
_SPREADS, _MORE = 8, 7
_PI = Decimal("3.14159265358979323846264338327950288419716939937510")


def is_class(spread: int) -> bool:
    """Whether there is such a class."""
    plain = unrestored(spread) % TRELLIS
    return plain < CLASSES and (spread < TRELLIS or plain >= FIRST)


def unrestored(spread: int) -> int:
    """The class whose numbers are the same and whose values are of least squared error."""
    restored = RESTORED <= spread % TRELLIS < RESTORED + TOP
    return spread - RESTORED * restored


@lru_cache(maxsize=None)
def gain(spread: int) -> float:
    """By what the values of a class are multiplied after all: ``1 / (1 - d)`` if it is a restored one."""
    plain = unrestored(spread)
    if plain == spread:
        return 1.0
    lost = rate_distortion(plain)[1] / float(_spread(plain % TRELLIS)) ** 2
    found = 1 / max(1 - lost, 1 / MOST_GAIN)
    return round(found * 256) / 256  # the same on every machine


def low_bits(spread: int) -> int:
    """How many lowest bits the numbers of a class have that are written as they are."""
    return max((spread % TRELLIS - TOP) // PER_OCTAVE + 1, 0)


def coded_class(spread: int) -> int:
    """The class of what is left of a class's numbers without these bits."""
    octaves, known = spread % TRELLIS - TOP, spread % TRELLIS < TOP
    return spread if known else TOP - PER_OCTAVE + octaves % PER_OCTAVE


@lru_cache(maxsize=None)
def largest(spread: int) -> int:
    """The largest number that the table of a class without low bits has."""
    return math.ceil(_SPREADS * float(_spread(spread % TRELLIS))) + _MORE


@lru_cache(maxsize=None)
def table(spread: int) -> Tensor:
    """(2 L + 1,) uint16, how often -L to L are met in a class without low bits, in parts of 2^16."""
    with localcontext() as context:
        context.prec = 40
        counts = [int((p * 2**16).to_integral_value()) for p in _cells(spread)]
    counts = [min(max(count, 1), 2**16 - 1) for count in counts]
    return torch.tensor(counts).to(torch.uint16)


@lru_cache(maxsize=None)
def lengths(spread: int) -> Tensor:
    """(2 L + 1,) float64, bits that a symbol of :func:`table` takes."""
    counts = table(spread).double()
    return -(counts / counts.sum()).log2()


def dead_zone(spread: int) -> Decimal:
    """By how much the cell of zero is wider to each side, in steps.

    Near what loses least together with ``ln 2 / 6`` squared steps per bit, the slope of error against bits at high rates.
    """
    return min(Decimal("0.0165") / _spread(spread) ** 3, Decimal("0.49"))


def centroid(spread: int, size: int) -> float:
    """What a number of some size stands for: the mean of a Gaussian in its cell, in steps."""
    std = float(_spread(spread))
    low = (size - 0.5 + float(dead_zone(spread))) / std
    high = low + 1 / std
    mass = 0.5 * (math.erfc(low / 2**0.5) - math.erfc(high / 2**0.5))
    if mass < 1e-9:  # so far out that it falls off like an exponential
        return std * (low + 1 / low) if std < 1 else float(size)
    density = math.exp(-low * low / 2) - math.exp(-high * high / 2)
    return std * density / (2 * math.pi) ** 0.5 / mass


def stretch(spread: int) -> float:
    """By how much more than itself a value of a class along a trellis stands for."""
    return _ALONG[spread - FIRST][1] / 1000 if spread < TOP else 0.0


@lru_cache(maxsize=None)
def rate_distortion(spread: int) -> tuple[float, float]:
    """Bits per Gaussian value of a class, and its squared error in squared steps."""
    if spread >= TRELLIS + TOP:
        return rate_distortion(spread - TRELLIS)[0], _FINE
    if spread >= TRELLIS:
        bits, error = _ALONG[spread - TRELLIS - FIRST][2:]
        return bits / 10000, error / 10000
    if low_bits(spread):
        return rate_distortion(coded_class(spread))[0] + low_bits(spread), 1 / 12
    std, zone = float(_spread(spread)), float(dead_zone(spread))
    bits, code = 0.0, lengths(spread).tolist()
    error, most = std * std, largest(spread)
    for k in range(most + 1):
        low = (k - 0.5 + zone) / std if k else 0.0
        high = (k + 0.5 + zone) / std if k < most else math.inf
        mass = math.erfc(low / 2**0.5) - math.erfc(high / 2**0.5)  # on both sides
        bits += mass * code[k + most]
        if k:
            density = math.exp(-low * low / 2) - math.exp(-high * high / 2)
            first = std * density * (2 / math.pi) ** 0.5
            value = k + offset(spread)[min(k, 2) - 1]
            error -= 2 * value * first - value * value * mass
    return bits, error


@lru_cache(maxsize=None)
def offset(spread: int) -> tuple[float, float]:
    """How much farther from zero than themselves are the values of 1, and of larger numbers as of 2: their centroids."""
    return centroid(spread, 1) - 1, centroid(spread, 2) - 2


def _spread(spread: int) -> Decimal:
    """Standard deviation of a class in steps; square roots are rounded alike everywhere, other powers need not be."""
    octave, quarter = divmod(spread, PER_OCTAVE)
    with localcontext() as context:
        context.prec = 40
        return Decimal(2**quarter).sqrt().sqrt() * Decimal(2) ** (octave + LOWEST)


def _cells(spread: int) -> list[Decimal]:
    """How often -L to L are met; in either codebook of a trellis k stands for ``k + 1/4``."""
    if spread < TRELLIS:
        std, edges = _spread(spread), [dead_zone(spread)] * 2
    else:
        narrower = Decimal(_ALONG[spread - TRELLIS - FIRST][0]) / 100
        std = _spread(spread - TRELLIS) * narrower
        edges = [Decimal("-0.25"), Decimal("0.25")]
    below, above = (
        [_upper_tail((k + Decimal("0.5") + edge) / std) for k in range(largest(spread))]
        + [Decimal(0)]
        for edge in edges
    )
    down = [a - b for a, b in zip(below, below[1:])]
    up = [a - b for a, b in zip(above, above[1:])]
    return [*reversed(down), 1 - below[0] - above[0], *up]


def _upper_tail(x: Decimal) -> Decimal:
    """``1 - Phi(x)`` for x > 0 by the series of the error function."""
    if x > 9:
        return Decimal(0)
    term = total = x
    k = 1
    while term > total * Decimal("1e-38"):
        k += 2
        term = term * x * x / k
        total += term
    density = (-x * x / 2).exp() / (2 * _PI).sqrt()
    return max(Decimal("0.5") - density * total, Decimal(0))
