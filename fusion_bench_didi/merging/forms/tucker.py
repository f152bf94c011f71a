"""Tucker-2: bases U and V that all tasks share, and a small core C_t per task, for ``tau_t ~ U C_t V`` (``lowrank/tucker.py``)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...allocation.curves import least
from ...allocation.tucker_curve import TuckerCurve
from ...deltas.base import Delta
from ...deltas.precision import Precision
from ...deltas.sink import EncodedTensor
from ...lowrank import svd
from ...lowrank.factors import Matrix, energy_of
from ...lowrank.overlap import subspace_overlap
from ...lowrank.svd import HalfSVD
from ...lowrank.tucker import (
    TuckerBases,
    cores,
    optimistic_tucker,
    refine_tucker,
    tucker_bases,
)
from ..context import MergeContext
from ..rank_bounds import REACH
from ..reconstruction import squared_error
from ..spectra import SPENT
from .base import Choice, Decision, Look
from .coded import CODED
from .experts import EXPERTS
from .uneven import columns_beyond_gaussian

#: Looked into where the even share is below this part of what a matrix costs dense ...
WORTH_CORES = 0.35
#: ... and the leading directions of all tasks together hold this much more than those of unrelated tasks. Chance makes a
#: few hundredths; the matrices of real8's towers have 1.4 to 2.3.
WORTH_TOGETHER = 1.07


class Tucker:
    """Cores of sizes p and q in shared bases."""

    name = "tucker"

    def choices(self, look: Look) -> Iterator[Choice]:
        """In every precision in which they may pay.

        None where the even share pays for the dense matrix in a precision that loses little: finer ones do not compete then.
        """
        context, name, shape = look.context, look.name, look.sides
        share = look.bounds.even_share(name)
        precisions = context.inventory.precisions[name]
        dense = {p: p.rate(*shape).dense for p in precisions}
        most = context.inventory.most(name)
        held = most is None and any(
            p.rounding_dense < SPENT and share >= b for p, b in dense.items()
        )
        allowed = [p for p, bits in dense.items() if share <= WORTH_CORES * bits]
        if held or not allowed or not context.settings.tucker or look.dense:
            return
        if look.guess.multiplier <= 0 or not look.tensor.stackable:
            return
        found, weights = look.experts.bases.load()[1:], look.weights
        if subspace_overlap(found, weights) < WORTH_TOGETHER:
            return
        # bases alone cannot take more than what the matrix is likely to be given
        values = REACH * share * len(found) / allowed[0].bits
        up, down = (max(int(values / side), 1) for side in shape)
        tasks = sum(b.tail_energy > 0 or bool(b.S.any()) for b in found)
        sketched = min(shape) >= svd.SKETCH_SIDE
        if sketched:
            most_kept = optimistic_tucker(
                shape, found, weights, max_up=up, max_down=down
            )
            curves = _curves(most_kept, allowed, tasks, most)
            others = (
                *EXPERTS.curves(context, name, look.experts),
                *CODED.choices(look),
            )
            alone = least((one.curve for one in others), look.guess.multiplier)
            if least(curves, look.guess.multiplier) >= alone:
                return
        spaces = tucker_bases(
            look.matrices,
            weights,
            bases=found if sketched else None,
            max_up=up,
            max_down=down,
            name=name,
        )
        empty = spaces.up.new_zeros(0)
        both = (spaces.up, spaces.down.mT)
        kept = context.store.keep(tuple(HalfSVD(b, empty, 0.0) for b in both))
        beyond = columns_beyond_gaussian(spaces.up, spaces.down, allowed)
        curves = _curves(spaces, allowed, tasks, most, beyond)
        for precision, curve in zip(allowed, curves):
            yield Choice(self, precision, curve, kept)

    def encode(self, context: MergeContext, decision: Decision) -> EncodedTensor:
        name, (p, q) = decision.name, decision.point
        tensor, (m, n) = context.tensor(name), context.sides(name)
        vectors, kept = tensor.matrices(), decision.bases.take()
        left, right = (b.vectors.to(context.device) for b in kept)
        up = torch.eye(m).to(left) if p == m else left[:, :p]
        down = torch.eye(n).to(right) if q == n else right[:, :q].mT
        if context.settings.refinement != "none":
            refining = context.settings.refining
            up, down = refine_tucker(
                vectors,
                context.weights[name],
                up,
                down,
                sweeps=refining.sweeps,
                tolerance=refining.tolerance,
            )
        made = encode_cores(
            up, down, vectors, shape=tensor.shape, precision=decision.precision
        )
        return EncodedTensor(name, *made)

    def ranks(self, decision: Decision, tasks: int) -> list[int]:
        return [min(decision.point)] * (tasks + 1)


def _curves(
    spaces: TuckerBases,
    precisions: Sequence[Precision],
    tasks: int,
    most: int | None,
    beyond: Sequence[Tensor | float] | None = None,
) -> list[TuckerCurve]:
    """Curves of the Tucker-2 form in every precision.

    Args:
        tasks: that are changed.
        most: the largest rank of a core that is allowed.
        beyond: what rounding loses beyond what is expected.
    """
    shape = spaces.up.shape[0], spaces.down.shape[1]
    p, q = spaces.sizes_up[:, None], spaces.sizes_down
    curves = []
    for precision, more in zip(precisions, beyond or [0.0] * len(precisions)):
        bits = precision.common_bits(shape, tasks, p, q)
        rounding = precision.common_rounding(shape, p, q) + more
        curves.append(TuckerCurve.of(spaces, bits, rounding, tasks, most=most))
    return curves


def encode_cores(
    up: Tensor,
    down: Tensor,
    task_vectors: Sequence[Matrix],
    *,
    shape: tuple[int, ...],
    precision: Precision,
) -> tuple[Delta, list[Delta | None], Tensor]:
    """Quantized bases and cores of one matrix, and (T,) squared errors; cores are fitted to the bases *as stored*.

    Args:
        up, down: (m, p) and (q, n), square for whole sides.
        task_vectors: T of (m, n).
        shape: of the tensor.
    """
    shared = precision.bases(shape, up.cpu(), down.cpu())
    stored = zip(shared.bases(), (up, down))
    up, down = (whole.cpu() if kept is None else kept for kept, whole in stored)
    vectors = [tau.cpu() for tau in task_vectors]
    experts = [
        precision.core(shape, core) if bool(energy_of(tau) > 0) else None
        for core, tau in zip(cores(vectors, up, down), vectors)
    ]
    errors = [squared_error(shared, e, tau) for e, tau in zip(experts, vectors)]
    return shared, experts, torch.stack(errors)


TUCKER = Tucker()
