"""Operational rate-distortion curves: what one form of one matrix, in one precision, loses at every number of bits.

For a multiplier (error per bit) the best operating point of a curve is known in closed form; a *point* is whatever the form
needs to know to encode itself there: an index per task, or the sizes of a core. Letters: ``T`` tasks, ``K`` points per task.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor


class Curve(Protocol):
    """The rate-distortion curve of one way to store a matrix."""

    @property
    def zero_rate_multiplier(self) -> float:
        """Error per bit above which nothing is stored."""

    def at(self, multiplier: float) -> tuple[float, float]:
        """Weighted error and bits where ``error + multiplier * bits`` is least."""


class PlacedCurve(Curve, Protocol):
    """A curve whose operating point the Lagrangian fixes; what is left of the budget then moves it up step by step."""

    def point(self, multiplier: float) -> Any:
        """The operating point where ``error + multiplier * bits`` is least."""

    def rate(self, point: Any) -> int:
        """Bits at an operating point."""

    def step(self, point: Any, left: int) -> tuple[float, Any] | None:
        """Gain per bit, and the point, of the best step up that costs at most ``left`` bits; None if there is none."""


AnyCurve = TypeVar("AnyCurve", bound=Curve)


def cost(curve: Curve, multiplier: float) -> float:
    """``error + multiplier * bits`` where that is least."""
    lost, bits = curve.at(multiplier)
    return lost + multiplier * bits


def least(curves: Iterable[Curve], multiplier: float) -> float:
    """:func:`cost` of the best of them."""
    return min(cost(curve, multiplier) for curve in curves)


def cheapest(curves: Iterable[AnyCurve], multiplier: float) -> AnyCurve:
    """The one of least :func:`cost`."""
    return min(curves, key=lambda curve: cost(curve, multiplier))


@dataclass(frozen=True)
class PerTaskCurve:
    """Experts that are chosen task by task out of the same few sizes, beside a shared part of fixed size.

    Args:
        error: (T, K) weighted.
        bits: (K,) of one expert, ascending.
        shared: bits of the shared part.
    """

    error: Tensor
    bits: Tensor
    shared: int = 0

    @property
    def zero_rate_multiplier(self) -> float:
        return float((self.error[:, :1] / self.bits[1]).max())

    def at(self, multiplier: float) -> tuple[float, float]:
        best = self._best(multiplier)
        lost = float(self.error.gather(1, best[:, None]).sum())
        return lost, float(self.bits[best].sum()) + self.shared

    def point(self, multiplier: float) -> tuple[int, ...]:
        """(T,) index of each task's size."""
        return tuple(self._best(multiplier).tolist())

    def _best(self, multiplier: float) -> Tensor:
        return (self.error + multiplier * self.bits).argmin(1)  # (T,)

    def rate(self, point: tuple[int, ...]) -> int:
        return int(self.bits[list(point)].sum()) + self.shared

    def step(
        self, point: tuple[int, ...], left: int
    ) -> tuple[float, tuple[int, ...]] | None:
        found = None
        for t, k in enumerate(point):
            extra = self.bits - self.bits[k]
            gain = (self.error[t, k] - self.error[t]) / extra.clamp(min=1)
            gain = gain.masked_fill((extra <= 0) | (extra > left), 0.0)
            best = int(gain.argmax())
            if gain[best] > 0 and (found is None or float(gain[best]) > found[0]):
                found = float(gain[best]), (*point[:t], best, *point[t + 1 :])
        return found
