"""Rate and distortion of Tucker-2 forms at every pair of sizes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.tucker import TuckerBases
from .spectra import NEVER

#: Errors below this part of the energy cannot be told from none: the two are sums in float32.
EXACT = 1e-7


@dataclass(frozen=True)
class TuckerCurve:
    """The curve of shared bases U (m, p) and V (q, n) with a core (p, q) per task.

    Args:
        sizes_up, sizes_down: values of p and of q.
        error: (len(sizes_up), len(sizes_down)) weighted.
        bits: as ``error``.
    """

    sizes_up: Tensor
    sizes_down: Tensor
    error: Tensor
    bits: Tensor

    @classmethod
    def of(
        cls,
        spaces: TuckerBases,
        bits: Tensor,
        rounding: Tensor,
        tasks: int,
        *,
        most: int | None = None,
    ) -> "TuckerCurve":
        """The curve over all pairs of sizes, from their bits and errors.

        Args:
            bits: of every pair of sizes.
            rounding: relative squared error that rounding adds to what is kept, as ``bits``.
            tasks: T; more than T q columns are of no use, nor more than T p rows.
            most: the largest rank of a core that is allowed.
        """
        p, q = spaces.sizes_up[:, None], spaces.sizes_down
        m, n = spaces.up.shape[0], spaces.down.shape[1]
        useless = (p > tasks * q) | (q > tasks * p) | ((p == m) & (q == n))
        if most is not None:
            useless = useless | (torch.minimum(p, q) > most)
        bits = bits.double().masked_fill(useless, NEVER)
        error = spaces.energy - spaces.kept * (1 - rounding)
        error = error.clamp(min=EXACT * spaces.energy)
        return cls(spaces.sizes_up, spaces.sizes_down, error, bits)

    @property
    def zero_rate_multiplier(self) -> float:
        return float(self.error.max() / self.bits.min())

    def at(self, multiplier: float) -> tuple[float, float]:
        where = self._best(multiplier)
        return float(self.error.flatten()[where]), float(self.bits.flatten()[where])

    def point(self, multiplier: float) -> tuple[int, int]:
        """(p, q) where ``error + multiplier * bits`` is least."""
        up, down = divmod(self._best(multiplier), len(self.sizes_down))
        return int(self.sizes_up[up]), int(self.sizes_down[down])

    def step(
        self, sizes: tuple[int, int], left: int
    ) -> tuple[float, tuple[int, int]] | None:
        """Gain per bit and sizes of the best step up in one size or in both that costs at most ``left`` bits."""
        i, j = self._index(sizes)
        rows, columns = self.error.shape
        found = None
        for a, b in ((i + 1, j), (i, j + 1), (i + 1, j + 1)):
            if a < rows and b < columns:
                extra = float(self.bits[a, b] - self.bits[i, j])
                gain = float(self.error[i, j] - self.error[a, b])
                if 0 < extra <= left and gain > 0:
                    to = (int(self.sizes_up[a]), int(self.sizes_down[b]))
                    found = max(found or (0.0, to), (gain / extra, to))
        return found

    def rate(self, sizes: tuple[int, int]) -> int:
        """Bits of a Tucker-2 form at these sizes of its bases."""
        return int(self.bits[self._index(sizes)])

    def _index(self, sizes: tuple[int, int]) -> tuple[int, int]:
        i = int(torch.searchsorted(self.sizes_up, sizes[0]))
        return i, int(torch.searchsorted(self.sizes_down, sizes[1]))

    def _best(self, multiplier: float) -> int:
        return int((self.error + multiplier * self.bits).argmin())
