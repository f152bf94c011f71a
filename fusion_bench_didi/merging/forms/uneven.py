"""Shared parts whose energy lies in few rows or entries round worse than Gaussian numbers, by which precisions are priced.

Levels of few bits have no zero, so that where most numbers are next to nothing and few are large all is lost. What is measured
beyond the Gaussian error, where that is no chance, is added to what every task loses.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ...allocation.experts_curve import ExpertsCurve
from ...deltas.precision import Precision
from ...lowrank.factors import Matrix, energy_of, full_rank
from ..reconstruction import encode_shared, squared_error

#: Measured errors are taken for those of Gaussian numbers up to so many times theirs.
EXPECTED = 2.0


def beyond_gaussian(
    shared: Matrix, rank: int, precisions: Sequence[Precision]
) -> list[float]:
    """Per precision, by how much more of the energy than expected rounding loses of a shared part.

    Args:
        shared: (m, n), factored below full rank.
    """
    shared, shape = shared.to("cpu"), tuple(shared.shape)
    energy = max(float(energy_of(shared)), 1e-300)
    found = []
    for precision in precisions:
        lost = 0.0
        if precision.dtype is None:
            stored = encode_shared(shared, rank, shape=shape, precision=precision)
            lost = float(squared_error(stored, None, shared)) / energy
        whole = rank >= full_rank(*shape)
        usual = precision.rounding_dense if whole else precision.rounding
        found.append(_beyond(lost, usual))
    return found


def columns_beyond_gaussian(
    up: Tensor, down: Tensor, precisions: Sequence[Precision]
) -> list[float]:
    """As :func:`beyond_gaussian`, of common bases (m, p) and (q, n)."""
    shape, found = (len(up), down.shape[1]), []
    for precision in precisions:
        more = 0.0
        if precision.dtype is None:
            stored = precision.bases(shape, up.cpu(), down.cpu()).bases()
            for kept, exact in zip(stored, (up.cpu(), down.cpu())):
                if kept is not None:
                    lost = float((kept - exact).square().sum() / exact.square().sum())
                    more = max(more, _beyond(lost, precision.rounding_dense))
        found.append(more)
    return found


def _beyond(lost: float, usual: float) -> float:
    return lost - usual if lost > EXPECTED * usual else 0.0


def at_its_price(curve: ExpertsCurve, more: float, energy: float) -> ExpertsCurve:
    """The curve of experts beside a shared part that loses more of its energy than expected; experts round as it does."""
    if not more:
        return curve
    return replace(
        curve,
        tail_energy=curve.tail_energy + more * energy,
        rounding=curve.rounding + more,
        rounding_dense=curve.rounding_dense + more,
    )
