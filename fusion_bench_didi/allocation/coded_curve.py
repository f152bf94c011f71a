"""The rate-distortion curve of entropy-coded experts: the step of each follows from the multiplier (error per bit).

Letters: ``T`` tasks, ``q`` directions that are known.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..quantization.dead_zone import CLASS_BITS, SLOPES, Quantizer, rate_distortion

#: Bits of a step, and of what a stream may take beyond its symbols.
OVERHEAD = 96
#: Steps are this part of the root mean square of an expert's entries at least.
FINEST = 2.0**-12
#: Parts by which the multiplier falls from a point of the curve to the next, of which the first that fits is taken.
PARTS = tuple(0.05 * 2.0**-i for i in range(8))


@dataclass(frozen=True)
class CodedPoint:
    """An operating point on the rate-distortion curve of coded experts.

    Args:
        multiplier: error per bit.
        bits: (T,) that each expert may take; 0 for none.
        steps: (T,) in the unit of the entries.
        ranks: (T,) directions that are coded; the short side where all entries are.
        whole: (T,) whether all entries are coded instead of directions.
        errors: (T,) expected, squared.
    """

    multiplier: float
    bits: tuple[int, ...]
    steps: tuple[float, ...]
    ranks: tuple[int, ...]
    whole: tuple[bool, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class CodedCurve:
    """Experts, each as its leading directions, as all entries, or not at all: whichever is best at a multiplier.

    Args:
        shape: m and n.
        sigma: (T, q) singular values; q = 0 where low rank is not to be had.
        energy: (T,) squared norms.
        weights: (T,) of the squared errors.
        whole: whether all entries may be coded.
        quantizer: of the numbers.
    """

    shape: tuple[int, int]
    sigma: Tensor
    energy: Tensor
    weights: Tensor
    whole: bool = True
    quantizer: Quantizer = "scalar"

    @property
    def slope(self) -> float:
        """Error per bit that goes with a step, in squared steps."""
        return SLOPES[self.quantizer]

    @property
    def zero_rate_multiplier(self) -> float:
        return float((self.weights.double() * self.energy.double()).max()) / OVERHEAD

    def at(self, multiplier: float) -> tuple[float, float]:
        bits, error, _, _ = self._best(multiplier)
        return self._weighted(error), float(bits.sum())

    def point(self, multiplier: float) -> CodedPoint:
        bits, errors, ranks, whole = self._best(multiplier)
        return CodedPoint(
            multiplier,
            tuple(bits.long().tolist()),
            tuple(self._steps(multiplier).tolist()),
            tuple(ranks.tolist()),
            tuple(whole.tolist()),
            tuple(errors.tolist()),
        )

    def worthy(self, multiplier: float) -> list[int]:
        """(T,) known directions that are worth their bits; if all of them are, more might be."""
        return self._low_rank(self._steps(multiplier))[2].tolist()

    def rate(self, point: CodedPoint) -> int:
        return sum(point.bits)

    def step(self, point: CodedPoint, left: int) -> tuple[float, CodedPoint] | None:
        before = self.rate(point)
        least = self.point(point.multiplier * (1 - PARTS[-1]))
        if self.rate(least) - before > left:
            return None  # larger parts take no less
        for part in PARTS:
            finer = self.point(point.multiplier * (1 - part))
            more = self.rate(finer) - before
            if 0 < more <= left:
                lost, less = (
                    self._weighted(torch.tensor(one.errors, dtype=torch.float64))
                    for one in (point, finer)
                )
                return (lost - less) / more, finer
        return None

    def _weighted(self, error: Tensor) -> float:
        return float((self.weights.double() * error).sum())

    def _steps(self, multiplier: float) -> Tensor:
        """Quantization step of each expert at a multiplier, (T,) float64."""
        weights = self.weights.double().clamp(min=1e-300)
        root = (self.energy.double() / math.prod(self.shape)).sqrt()
        steps = (multiplier / self.slope / weights).sqrt().maximum(FINEST * root)
        return steps.clamp(min=torch.finfo(torch.float32).tiny)

    def _best(self, multiplier: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(T,) bits, squared error and rank of what is best, and whether that is all entries."""
        steps, energy = self._steps(multiplier), self.energy.double()
        nothing = torch.zeros_like(energy)
        options = [(nothing, energy, nothing.long()), self._low_rank(steps)]
        if self.whole:
            options.append(self._dense(steps))
        bits, error, ranks = (torch.stack(column) for column in zip(*options))
        best = (error + self.slope * steps.square() * bits).argmin(0, keepdim=True)
        best = best.masked_fill(energy == 0, 0)
        found = (t.gather(0, best)[0] for t in (bits.ceil(), error, ranks))
        return *found, best[0] == 2

    @cached_property
    def _there(self) -> int:
        """Directions that any expert has, of those that are known: few where all are adapters."""
        return int((self.sigma > 0).sum(1).max())

    def _low_rank(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bits, error and rank of each expert if the directions worth their bits are coded.

        Of each, both sides keep a part of the energy, together the product. What rounding changes of the short side within
        the space of all directions, a part ``r / s`` of it, is made good by the long side, which is fitted to it; of what it
        changes of the long side, the round before makes good ``r / l (1 - r / s)``. Measured errors are within 1 % of it for
        ranks up to a third of s, within 7 % beyond.
        """
        known, sides = self.sigma.shape[1], sorted(self.shape)
        sigma = self.sigma[:, : self._there].double()
        roots = sigma.new_tensor(sides).sqrt()[:, None, None]
        spread = sigma / roots / steps[:, None]  # (2, T, q)
        rate, lost = rate_distortion(spread, self.quantizer)
        bits = 2.0 * CLASS_BITS + sides[0] * rate[0] + sides[1] * rate[1]
        short, long = 1 - (lost / spread.square().clamp(min=1e-300)).clamp(max=1.0)
        worth = self.slope * steps.square()[:, None] * bits
        pays = sigma.square() * short * long > worth
        parts = [pays.sum(1, keepdim=True) / side for side in sides]
        short = 1 - (1 - short) * (1 - parts[0])
        long = 1 - (1 - long) * (1 - parts[1] * (1 - parts[0]))
        held, taken = (
            # as many terms as are known, so that sums round the same way
            pad(of_each * pays, (0, known - self._there)).sum(1)
            for of_each in (sigma.square() * short * long, bits)
        )
        left = self.energy.double() - held
        return taken + OVERHEAD, left.clamp(min=0.0), pays.sum(1)

    def _dense(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bits, error and rank of each expert if all entries are coded, as if all rows were alike."""
        m, n = self.shape
        root = (self.energy.double() / (m * n)).sqrt()
        bits, error = rate_distortion(root / steps, self.quantizer)
        bits = m * n * bits + CLASS_BITS * m + OVERHEAD
        ranks = torch.full_like(steps, min(m, n)).long()
        return bits, m * n * steps.square() * error, ranks
