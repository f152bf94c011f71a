"""Symmetric rounding of factors to few bits, one scale per direction.

``x ~ codes * scale``, codes integers in ``[-(2^(b-1) - 1), 2^(b-1) - 1]``. In a product ``up @ down`` only the product of
the two scales of a direction counts, so a rank-r module stores r scales. Letters: ``m`` out, ``n`` in, ``r`` rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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
    top = 2 ** (bits - 1) - 1
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=1, keepdim=True)
    step = largest.clamp_(min=torch.finfo(x.dtype).tiny) / top
    if bits < 8:
        step = step * _best_clip(x[:, :: -(-x.shape[1] // _SAMPLE)], step, top)
    codes = torch.div(x, step).round_().clamp_(-top, top).to(torch.int8)
    return codes, step[:, 0]


def _best_clip(x: Tensor, step: Tensor, top: int) -> Tensor:
    """(r, 1) which fraction of the range given by ``step`` (r, 1) leaves the least squared error."""
    errors = []
    for clip in _CLIPS:
        coded = torch.div(x, clip * step).round_().clamp_(-top, top)
        errors.append(coded.mul_(clip * step).sub_(x).square_().sum(1))
    best = torch.stack(errors).argmin(
        0
    )  # the first of equals, as few entries as possible are clipped
    return torch.tensor(_CLIPS, dtype=x.dtype, device=x.device)[best][:, None]


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
    """Two signed 4-bit codes per byte, (ceil(numel / 2),) uint8."""
    flat = codes.reshape(-1).to(torch.int16) + 8
    flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).view(-1, 2)
    return (flat[:, 0] | (flat[:, 1] << 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The int8 codes that :func:`pack_nibbles` was given."""
    both = torch.stack([packed & 15, packed >> 4], 1).reshape(-1).to(torch.int8) - 8
    numel = 1
    for side in shape:
        numel *= side
    return both[:numel].view(shape)
