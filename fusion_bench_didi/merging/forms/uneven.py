"""What has its energy in few rows or entries rounds worse than Gaussian numbers, by which precisions are priced.

Levels of few bits have no zero, so that where most numbers are next to nothing and few are large all is lost. What is measured
beyond the Gaussian error, where that is no chance, is added to what every task loses: of dense experts on a sample of rows,
of shared parts whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...allocation.experts_curve import ExpertsCurve
from ...deltas.precision import Precision
from ...lowrank.factors import Matrix, energy_of, full_rank
from ...lowrank.row_blocks import materialize
from ...quantization.rounding import lost_by_row
from ...task_vectors.tensor import ChangedTensor
from ..reconstruction import encode_shared, squared_error

#: Measured errors are taken for those of Gaussian numbers up to so many times theirs: of what is shared; and of dense experts,
#: where entries of fine-tuned models, those of biases first, are somewhat uneven.
EXPECTED, EXPECTED_DENSE = 2.0, 4.0
#: What rounding of a shared part loses is little up to this part of what it leaves to the experts.
LITTLE = 0.25
#: Entries of all tasks of which that is measured, and rows at least.
SAMPLE, ROWS = 2**16, 8


def dense_beyond_gaussian(
    tensor: ChangedTensor, norms: Tensor, precisions: Sequence[Precision]
) -> tuple[float, ...]:
    """Per precision, by how much more of the energy of dense experts than expected rounding loses; the mean over tasks.

    Half of the rows that are looked at are those of most energy, the others stand for all that remain.

    Args:
        norms: (T, m) of the rows of the task vectors.
    """
    if tensor.large:
        return (0.0,) * len(precisions)  # it would be read once more
    terms, (_, n) = tensor.differences(), tensor.sides
    count = max(ROWS, SAMPLE // max(len(terms) * n, 1))
    energy = norms.double().square()
    order = energy.sum(0).argsort(descending=True, stable=True)
    first, rest = order[: count // 2], order[count // 2 :]
    some = rest[:: max(-(-len(rest) // (count - count // 2)), 1)]
    rows = torch.cat([first, some])
    at = rows.to(tensor.device)
    samples = [
        materialize((x[at], None if base is None else base[at])) for x, base in terms
    ]
    stacked = torch.cat(samples).cpu()
    times = torch.ones(len(terms), len(rows), dtype=torch.float64)
    seen = energy[:, some].sum(1).clamp(min=1e-300)
    times[:, len(first) :] = (energy[:, rest].sum(1) / seen)[:, None]
    whole = energy.sum(1)

    def more(precision: Precision) -> float:
        rounded = lost_by_row(stacked, precision.bits).view(len(terms), -1)
        parts = (rounded * times).sum(1)[whole > 0] / whole[whole > 0]
        return _beyond(float(parts.mean()), precision.rounding_dense, EXPECTED_DENSE)

    return tuple(_of_codes(more, precisions))


def beyond_gaussian(
    shared: Matrix, rank: int, precisions: Sequence[Precision]
) -> list[float]:
    """Per precision, by how much more of the energy than expected rounding loses of a shared part (m, n), factored below full rank."""
    shared, shape = shared.to("cpu"), tuple(shared.shape)
    energy = max(float(energy_of(shared)), 1e-300)

    def more(precision: Precision) -> float:
        stored = encode_shared(shared, rank, shape=shape, precision=precision)
        lost = float(squared_error(stored, None, shared)) / energy
        return _beyond(lost, _usual(precision, rank >= full_rank(*shape)))

    return _of_codes(more, precisions)


def columns_beyond_gaussian(
    up: Tensor, down: Tensor, precisions: Sequence[Precision]
) -> list[float]:
    """As :func:`beyond_gaussian`, of common bases (m, p) and (q, n)."""
    shape, exact = (len(up), down.shape[1]), (up.cpu(), down.cpu())

    def more(precision: Precision) -> float:
        pairs = zip(precision.bases(shape, *exact).bases(), exact)
        lost = [
            float((kept - whole).square().sum() / whole.square().sum())
            for kept, whole in pairs
            if kept is not None
        ]
        return max((_beyond(x, precision.rounding_dense) for x in lost), default=0.0)

    return _of_codes(more, precisions)


def _of_codes(
    more: Callable[[Precision], float], precisions: Sequence[Precision]
) -> list[float]:
    """What is measured of integer codes; floating types lose what is expected."""
    return [more(p) if p.dtype is None else 0.0 for p in precisions]


def _usual(precision: Precision, whole: bool) -> float:
    return precision.rounding_dense if whole else precision.rounding


def _beyond(lost: float, usual: float, times: float = EXPECTED) -> float:
    return lost - usual if lost > times * usual else 0.0


def at_its_price(
    curve: ExpertsCurve, precision: Precision, more: float, energy: float
) -> ExpertsCurve:
    """The curve of experts beside a shared part that loses some of its energy; beyond what is expected, experts round as it does.

    What is expected is left out where it is little beside what experts are to take: they are fitted to what the stored part
    leaves. Where tasks are alike there is next to nothing else, and nothing takes it.

    Args:
        more: the part of its energy that rounding loses beyond what is expected.
        energy: of the shared part.
    """
    usual = _usual(precision, curve.shared_rank >= curve.full)
    left = curve.sigma.double().square().sum(1) + curve.tail_energy
    counts = usual * energy > LITTLE * float(left.mean())
    lost = more + usual if counts else more
    if not lost:
        return curve
    return replace(
        curve,
        tail_energy=curve.tail_energy + lost * energy,
        rounding=curve.rounding + more,
        rounding_dense=curve.rounding_dense + more,
    )
