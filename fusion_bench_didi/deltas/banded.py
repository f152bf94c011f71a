"""A low-rank product whose leading directions have more bits than the others."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointMismatchError
from ..lowrank.factors import LowRankFactors
from ..quantization.codes import levels, pack_codes, packed_size
from ..quantization.rounding import RoundedFactors
from .base import Delta

#: Bits of the codes of each band of directions, the leading ones first.
BANDS = (8, 3, 2)


class BandedLowRankDelta(Delta):
    """Rounded products of several widths: ``shared + sum of (up * scale) @ down`` over bands of directions.

    Args:
        up, down: the (m, r_b) and (r_b, n) codes of every band b, packed, one after the other, uint8.
        scale: (r,) of all directions.
        ranks: (3,) int32, the directions r_b of each band.
    """

    kind = "banded_low_rank"
    parts = ("up", "down", "scale", "ranks")

    @classmethod
    def of(
        cls, shape: tuple[int, ...], bands: Sequence[RoundedFactors]
    ) -> "BandedLowRankDelta":
        """From one rounded product per band, some of them empty."""
        ups = [pack_codes(b.up, b.bits).reshape(-1).view(torch.uint8) for b in bands]
        downs = [
            pack_codes(b.down, b.bits).reshape(-1).view(torch.uint8) for b in bands
        ]
        scale = torch.cat([band.scale for band in bands])
        ranks = torch.tensor([len(band.scale) for band in bands], dtype=torch.int32)
        parts = (torch.cat(ups), torch.cat(downs), scale)
        return cls(shape, *(part.cpu() for part in parts), ranks)

    def own_product(self) -> LowRankFactors:
        m, n = self.sides
        ranks = self.ranks.tolist()
        up = _unpacked(self.up, [(m, rank) for rank in ranks])
        down = _unpacked(self.down, [(rank, n) for rank in ranks])
        whole = torch.cat(up, 1)
        if whole.shape[1] != len(self.scale):
            raise _damaged(f"{len(self.scale)} scales")
        return LowRankFactors(whole * self.scale.float(), torch.cat(down))


def _unpacked(packed: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Levels of the codes of every band, float32."""
    sides = [math.prod(shape) for shape in shapes]
    sizes = [packed_size(numel, width) for numel, width in zip(sides, BANDS)]
    if min(sides) < 0 or sum(sizes) != len(packed):
        raise _damaged(f"{len(packed)} bytes of codes")
    found = []
    for part, width, shape in zip(packed.split(sizes), BANDS, shapes):
        part = part.view(torch.int8) if width == 8 else part
        found.append(levels(part, width, shape))
    return found


def _damaged(what: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{what} are not those of the stored ranks. Write the model again."
    )
