"""Common subspaces: what several task vectors share although they are orthogonal to one another.

Task vectors of one matrix often use the same few rows and columns in different combinations. Then

    ``tau_t ~ U C_t V``,   U (m, p) and V (q, n) orthonormal and common to all tasks, C_t (p, q) a task's own core,

which is a Tucker-2 decomposition of the stacked task vectors. It costs ``p m + q n + T p q`` numbers where T experts of rank
r cost ``T r (m + n)``. The start are the leading eigenvectors of ``sum_t w_t tau_t tau_t^T`` and of its mirror image, whose
leading p and q columns are nested, so that one product gives the error at every (p, q); at the sizes chosen, alternating
least squares (De Lathauwer, De Moor and Vandewalle 2000, "HOOI") then lowers it.

Letters: ``m`` out, ``n`` in, ``T`` tasks, ``p`` common columns, ``q`` common rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.tucker import TuckerBases

#: Errors below this part of the energy cannot be told from none: the two are sums in float32.
EXACT = 1e-7


#: Bits that no budget has.
NEVER = 2.0**62


@dataclass(frozen=True)
class TuckerCurve:
    """What common subspaces can do for a number of bits; an ``Curve`` of ``candidates.py``.

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
        cls, spaces: TuckerBases, bits: Tensor, rounding: Tensor, tasks: int
    ) -> "TuckerCurve":
        """
        Args:
            bits: price of every pair of sizes.
            rounding: relative squared error that rounding adds to what is kept, as ``bits``.
            tasks: T; more than T q columns are of no use, nor more than T p rows.
        """
        p, q = spaces.sizes_up[:, None], spaces.sizes_down
        m, n = spaces.up.shape[0], spaces.down.shape[1]
        useless = (p > tasks * q) | (q > tasks * p) | ((p == m) & (q == n))
        bits = bits.double().masked_fill(useless, NEVER)
        error = spaces.energy - spaces.kept * (1 - rounding)
        error = error.clamp(min=EXACT * spaces.energy)
        return cls(spaces.sizes_up, spaces.sizes_down, error, bits)

    @property
    def zero_rate_multiplier(self) -> float:
        return float(self.error.max() / self.bits.min())

    def at(self, mu: float) -> tuple[float, float]:
        where = self._best(mu)
        return float(self.error.flatten()[where]), float(self.bits.flatten()[where])

    def sizes(self, mu: float) -> tuple[int, int]:
        """(p, q) where ``error + mu * bits`` is least."""
        up, down = divmod(self._best(mu), len(self.sizes_down))
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
        """Bits at these sizes."""
        return int(self.bits[self._index(sizes)])

    def _index(self, sizes: tuple[int, int]) -> tuple[int, int]:
        i = int(torch.searchsorted(self.sizes_up, sizes[0]))
        return i, int(torch.searchsorted(self.sizes_down, sizes[1]))

    def _best(self, mu: float) -> int:
        return int((self.error + mu * self.bits).argmin())
