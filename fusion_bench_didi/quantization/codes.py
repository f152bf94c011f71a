"""Numbers of few bits: what an integer code stands for, and how codes lie in bytes.

A b-bit code c in ``[-2^(b-1), 2^(b-1) - 1]`` stands for the level ``c + 1/2``: as many levels above zero as below, which
matters where there are but four. Codes of 8 bits stand for themselves, ``-127 ... 127``, and are kept as int8 in their
shape; fewer bits are packed without gaps, low bits first, and kept flat as uint8 (on a little-endian machine).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

#: Numbers of bits that codes of factors and matrices may have; a single one can be packed as well.
WIDTHS = (2, 3, 4, 8)
_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def offset(bits: int) -> float:
    """Level less code."""
    return 0.0 if bits == 8 else 0.5


def ends(bits: int) -> tuple[int, int]:
    """Smallest and largest code."""
    top = 2 ** (bits - 1)
    return (-127, 127) if bits == 8 else (-top, top - 1)


def packed_size(numel: int, bits: int) -> int:
    """Bytes of so many codes."""
    return -(-numel * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 codes as they are stored: (packed_size,) uint8, or as they are for 8 bits."""
    if bits == 8:
        return codes
    flat = codes.reshape(-1) + 2 ** (bits - 1)
    size, fields = packed_size(len(flat), bits), F.pad(flat, (0, -len(flat) % 8))
    for lane, width in _lanes(bits):
        fields = fields.view(_INTEGERS[2 * lane])
        fields = (fields | (fields >> (lane - width))) & (2 ** (2 * width) - 1)
    if bits != 3:
        return fields.to(torch.uint8)[:size]  # a field is a byte
    return fields.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[:size]


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The int8 codes that :func:`pack_codes` was given."""
    if bits == 8:
        return packed.view(shape)
    if bits != 3:
        fields = packed.to(_INTEGERS[64 // bits])
    else:
        flat = F.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
        fields = F.pad(flat, (0, 8 - bits)).view(torch.int64).squeeze(1)
    for lane, width in reversed(_lanes(bits)):
        low = 2**width - 1
        fields = (fields | (fields << (lane - width))) & (low | (low << lane))
        fields = fields.view(_INTEGERS[lane])
    codes = fields - 2 ** (bits - 1)
    return codes[: math.prod(shape)].view(shape)


def _lanes(bits: int) -> list[tuple[int, int]]:
    """Neighbours are joined in pairs until a whole number of bytes is full: bits from one to the next, bits that are used."""
    rounds = {4: 1, 2: 2, 3: 3, 1: 3}[bits]
    return [(8 << i, bits << i) for i in range(rounds)]


def levels(
    packed: Tensor,
    bits: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What stored codes stand for, but for their scale; by a table of whole bytes where a byte's values fill a whole number."""
    if bits in (2, 4) and 8 // bits * dtype.itemsize <= 8:
        values = _of_bytes(bits, dtype, packed.device)
        found = values.index_select(0, packed.int()).view(dtype)
        return found[: math.prod(shape)].view(shape)
    if bits == 8:
        return packed.view(shape).to(dtype)
    return unpack_codes(packed, bits, shape).float().add_(offset(bits)).to(dtype)


@lru_cache(maxsize=None)
def _of_bytes(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256,) what the codes in a byte stand for, side by side in one whole number."""
    codes = unpack_codes(torch.arange(256, dtype=torch.uint8), bits, (256 * 8 // bits,))
    with torch.inference_mode(False):
        values = codes.float().add_(offset(bits)).to(device, dtype)
        return values.view(_INTEGERS[64 // bits * dtype.itemsize])
