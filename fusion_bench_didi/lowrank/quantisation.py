"""Symmetric rounding of factors to few bits, one scale per direction.

``x ~ codes * scale``, codes integers in ``[-(2^(b-1) - 1), 2^(b-1) - 1]``. In a product ``up @ down`` only the product of
the two scales of a direction counts, so a rank-r module stores r scales. Letters: ``m`` out, ``n`` in, ``r`` rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import blocks_of_rows, difference
from .factors import LowRankFactors

#: Mean squared rounding error of one Gaussian factor relative to its energy, by bits (optimal uniform step).
RELATIVE_ERROR = {4: 1.2e-2, 8: 1.2e-4}
#: Entries of a row that are looked at, and fractions of the largest that are tried as the end of the range.
_SAMPLE = 256
_CLIPS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)


@dataclass(frozen=True)
class RoundedFactors:
    """``(up * scale) @ down`` with integer factors.

    Args:
        up: (m, r) int8.
        down: (r, n) int8.
        scale: (r,) float32.
        bits: 8 or 4.
    """

    up: Tensor
    down: Tensor
    scale: Tensor
    bits: int

    def dense(self) -> Tensor:
        return (self.up.float() * self.scale) @ self.down.float()  # (m, n)


def round_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (r, n) int8 and scales (r,); for few bits with the least squared error over a few clipping ranges.

    The range is chosen on at most :data:`_SAMPLE` entries of a row.

    Args:
        x: (r, n).
    """
    coded, step = _coded(x, bits)
    return coded.to(torch.int8), step[:, 0]


def _coded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """:func:`round_rows` with the codes (r, n) and steps (r, 1) still in the type of ``x``."""
    top = 2 ** (bits - 1) - 1
    largest = x.abs().amax(1, keepdim=True)  # many times as fast as the norm
    step = largest.clamp_(min=torch.finfo(x.dtype).tiny).div_(top)
    if bits < 8:
        step.mul_(_best_clip(x[:, :: -(-x.shape[1] // _SAMPLE)] / step, top))
    return torch.div(x, step).round_().clamp_(-top, top), step


def _best_clip(x: Tensor, top: int) -> Tensor:
    """(r, 1) which fraction of the range leaves the least squared error in rows (r, n) that fill ``[-top, top]``."""
    errors, coded = [], torch.empty_like(x)
    for clip in _CLIPS:
        torch.mul(x, 1 / clip, out=coded).round_().clamp_(-top, top).mul_(clip)
        errors.append(torch.linalg.vector_norm(coded.sub_(x), dim=1))
    # the first of equals: as few entries as possible are clipped
    best = torch.stack(errors).argmin(0)
    return torch.tensor(_CLIPS, dtype=x.dtype, device=x.device)[best][:, None]


@dataclass(frozen=True)
class RoundedMatrix:
    """``codes * scale``, row by row.

    Args:
        codes: (m, n) int8; flat and two to a byte for 4 bits.
        scale: (m,) float32.
        bits: 8 or 4.
        error: squared norm of what rounding lost, float64.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    error: Tensor


def round_matrix(
    matrix: Tensor, bits: int, *, less: Tensor | None = None
) -> RoundedMatrix:
    """:func:`round_rows` of ``matrix - less``, packed, and what it lost.

    Blocks of rows go through all of it while they are in the cache: every entry is read from memory once, and neither
    the difference nor what the codes stand for is ever held whole.

    Args:
        matrix, less: (m, n) of any floating type; the difference is taken in float32.
    """
    m, n = matrix.shape
    packed = bits == 4
    shape, dtype = ((-(-m * n // 2),), torch.uint8) if packed else ((m, n), torch.int8)
    codes = torch.empty(shape, dtype=dtype, device=matrix.device)
    scale = torch.empty(m, device=matrix.device)
    lost = torch.empty_like(scale)  # norms of rows
    for rows in blocks_of_rows(matrix):
        x = difference(matrix, less, rows)
        coded, step = _coded(x, bits)
        if packed:
            place = slice(rows.start * n // 2, -(-rows.stop * n // 2))
            codes[place] = pack_nibbles(coded.to(torch.int8))
        else:
            codes[rows] = coded
        scale[rows] = step[:, 0]
        lost[rows] = torch.linalg.vector_norm(coded.mul_(step).sub_(x), dim=1)
    return RoundedMatrix(codes, scale, bits, lost.double().square().sum())


def round_factors(
    factors: LowRankFactors, *, bits: int, target: Tensor | None = None
) -> RoundedFactors:
    """Round a low-rank module; the second factor is first refitted to the already rounded one.

    Args:
        factors: the module, its directions orthogonal (as truncated SVDs are).
        target: (m, n) what the module should reproduce; the product itself if None.
    """
    if factors.rank == 0:
        empty = torch.int8
        return RoundedFactors(
            factors.up.to(empty), factors.down.to(empty), factors.up.new_zeros(0), bits
        )
    codes, scale = round_rows(factors.up.mT, bits)
    up = (codes * scale[:, None]).mT  # (m, r) as it will be read
    target_rows = (
        up.mT @ target if target is not None else up.mT @ factors.up @ factors.down
    )
    gram = up.mT @ up
    ridge = 1e-6 * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    down = torch.linalg.solve(gram + ridge * eye, target_rows)  # (r, n)
    down_codes, down_scale = round_rows(down, bits)
    return RoundedFactors(codes.mT, down_codes, scale * down_scale, bits)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two signed 4-bit codes per byte, (ceil(numel / 2),) uint8; the first of the two in the low bits."""
    flat = codes.reshape(-1) + 8
    flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
    pairs = flat.view(torch.int16)  # the first in the low byte
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The int8 codes that :func:`pack_nibbles` was given."""
    pairs = packed.to(torch.int16)
    pairs = (pairs | (pairs << 4)) & 0x0F0F
    both = pairs.view(torch.int8) - 8
    return both[: math.prod(shape)].view(shape)
