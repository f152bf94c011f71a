"""Random numbers by a counter: number i of a seed can be worked out by itself, the same everywhere and for ever.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), in integers of 64 bits that wrap around. What is drawn by
it need not be stored, only its seed; that of a library may change with its next release.
"""

import zlib

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def random_words(seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int64 in ``[0, 2^32)``: the upper halves of the first outputs of the generator.

    Args:
        seed: of 64 bits.
    """
    word = torch.arange(1, count + 1, device=device).mul_(_signed(_STEP))
    word += _signed(seed)
    for shift, factor in _MIXING:
        # a shift that brings zeros in, which int64 has not
        word ^= (word >> shift) & (2 ** (64 - shift) - 1)
        word *= _signed(factor)
    return (word >> 32) & (2**32 - 1)


def seed_of(*names: object) -> int:
    """A seed in ``[1, 2^32)`` for what has these names."""
    return max(zlib.crc32("\0".join(map(str, names)).encode()), 1)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63
