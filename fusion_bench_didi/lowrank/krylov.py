"""Block Krylov range finder (Musco and Musco 2015): a space that holds the leading eigenvectors of a symmetric matrix.

The blocks together find slowly decaying spectra much better than a power iteration at the same cost. Letters: ``s`` the
side of the symmetric matrix, ``q`` directions wanted, ``p`` directions searched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Directions searched beyond the multiple of those wanted.
EXTRA = 8


@dataclass(frozen=True)
class Search:
    """How a space is built: random directions of a fixed seed, taken through the matrix again and again.

    Args:
        oversampling: directions searched per direction wanted.
        blocks: that they come in.
        times: that each block is taken through the matrix.
    """

    oversampling: float
    blocks: int
    times: int

    def width(self, rank: int) -> int:
        """Directions per block."""
        return -(-(int(self.oversampling * rank) + EXTRA) // self.blocks)

    def directions(self, rank: int, side: int) -> int:
        """p, never more than the side."""
        return min(self.width(rank) * self.blocks, side)

    def space(
        self, times_matrix: Callable[[Tensor], Tensor], rank: int, like: Tensor
    ) -> Tensor:
        """An orthonormal basis (s, p) of the Krylov space.

        Args:
            times_matrix: (s, k) -> (s, k), the product with the symmetric matrix.
            rank: q.
            like: (..., s) of the type and device wanted.
        """
        side = like.shape[-1]
        seed = torch.Generator().manual_seed(side)
        block = torch.randn(side, self.width(rank), generator=seed).to(like)
        blocks = []
        for _ in range(self.blocks):
            for _ in range(self.times):
                block = times_matrix(block)
            block = torch.linalg.qr(block).Q
            blocks.append(block)
        return torch.linalg.qr(torch.cat(blocks, 1)[:, :side]).Q
