"""Matrices that are stored in common subspaces (``lowrank/common.py``): where they may pay, and how large they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...allocation.tucker_curve import TuckerCurve
from ...deltas.base import Delta
from ...deltas.precision import Precision
from ...lowrank import svd
from ...lowrank.factors import Matrix, energy_of
from ...lowrank.overlap import subspace_overlap
from ...lowrank.svd import HalfSVD
from ...lowrank.tucker import cores, refine_tucker, tucker_bases
from ..context import REACH, SPENT, Work
from ..metric import Metric
from ..reconstruction import Stored, _kept_out

#: Common subspaces are looked into where the even share is below this part of what a matrix costs whole ...
WORTH_COMMON = 0.35


#: ... and the leading directions of all tasks together hold this much more than those of unrelated tasks. Chance makes a
#: few hundredths; real fine-tuned towers have 1.5 to 2.2.
WORTH_TOGETHER = 1.07


@dataclass(frozen=True)
class Common:
    """A matrix that is stored in common subspaces.

    Args:
        sizes: p and q.
        offer: what other sizes would do.
        precision: of bases and cores.
    """

    sizes: tuple[int, int]
    offer: TuckerCurve
    precision: Precision

    @property
    def bits(self) -> int:
        return self.offer.rate(self.sizes)


def _in_common(work: Work, name: str, common: Common) -> tuple[Stored, Tensor]:
    """One matrix in common subspaces."""
    vectors, (m, n), (p, q) = work.read(name), work.shape(name), common.sizes
    kept = work.store.pop(common_key(name))
    left, right = (b.vectors.to(work.device) for b in kept)
    up = torch.eye(m).to(left) if p == m else left[:, :p]
    down = torch.eye(n).to(right) if q == n else right[:, :q].mT
    if work.settings.refinement != "none":
        refining = work.settings.refining
        up, down = refine_tucker(
            vectors,
            work.weights[name],
            up,
            down,
            sweeps=refining.sweeps,
            tolerance=refining.tolerance,
        )
    metric = work.metric(name)
    if metric is not None:
        vectors = work.task_vectors.matrices(name, work.device)
        down = down if q == n else down @ metric.inverse.to(down)
    shape = work.task_vectors.infos[name].shape
    return pack_common(
        up, down, vectors, shape=shape, precision=common.precision, metric=metric
    )


def common_offers(work: Work, name: str) -> list[tuple[TuckerCurve, Precision]]:
    """Common subspaces in every precision in which they may pay; their bases go to the store.

    None where the even share pays for the whole matrix in a precision that loses little: finer ones do not compete then.
    """
    shape, share = work.shape(name), work.share(name)
    whole = {p: p.rate(*shape).dense for p in work.inventory.precisions[name]}
    held = any(p.rounding_dense < SPENT and share >= bits for p, bits in whole.items())
    allowed = [p for p, bits in whole.items() if share <= WORTH_COMMON * bits]
    one_by_one = work.task_vectors.one_by_one(name)
    if held or one_by_one or not allowed or not work.settings.in_common:
        return []
    bases, weights = work.store.get(name)[1:], work.weights[name]
    if subspace_overlap(bases, weights) < WORTH_TOGETHER:
        return []
    # bases alone cannot take more than what the matrix is likely to be given
    most = REACH * share * len(bases) / allowed[0].bits
    spaces = tucker_bases(
        work.read(name),
        weights,
        bases=bases if min(shape) >= svd.SKETCH_SIDE else None,
        max_up=max(int(most / shape[0]), 1),
        max_down=max(int(most / shape[1]), 1),
        name=name,
    )
    empty = spaces.up.new_zeros(0)
    found = (spaces.up, spaces.down.mT)
    work.store.put(common_key(name), tuple(HalfSVD(b, empty, 0.0) for b in found))
    p, q = spaces.sizes_up[:, None], spaces.sizes_down
    tasks = sum(b.tail_energy > 0 or bool(b.S.any()) for b in bases)
    return [
        (
            TuckerCurve.of(
                spaces,
                precision.common_bits(shape, tasks, p, q),
                precision.common_rounding(shape, p, q),
                tasks,
            ),
            precision,
        )
        for precision in allowed
    ]


def grown(common: Mapping[str, Common], left: int) -> dict[str, Common]:
    """What is left of the budget, in bits, spent on larger subspaces, one step at a time where it gains most per bit."""
    common = dict(common)
    while True:
        steps = ((c.offer.step(c.sizes, left), name) for name, c in common.items())
        gain, sizes, name = max(
            ((*step, name) for step, name in steps if step), default=(0.0, None, "")
        )
        if sizes is None:
            return common
        larger = replace(common[name], sizes=sizes)
        left -= larger.bits - common[name].bits
        common[name] = larger


def common_key(name: str) -> str:
    """Where a matrix has its common bases in the store."""
    return f"{name}/common"


def pack_common(
    up: Tensor,
    down: Tensor,
    task_vectors: Sequence[Matrix],
    *,
    shape: tuple[int, ...],
    precision: Precision,
    metric: Metric | None = None,
) -> tuple[tuple[Delta, list[Delta | None]], Tensor]:
    """Stored forms of one matrix in common subspaces, and (T,) squared errors; cores are fitted to the bases *as stored*.

    Args:
        up, down: (m, p) and (q, n), square for whole sides.
        task_vectors: T of (m, n).
        shape: of the tensor.
        metric: how errors are weighed by direction; alike if None.
    """
    first = precision.bases(shape, up.cpu(), down.cpu())
    stored = zip(first.bases(), (up, down))
    up, down = (whole.cpu() if kept is None else kept for kept, whole in stored)
    vectors = [tau.cpu() for tau in task_vectors]
    if metric is None:
        fitted = cores(vectors, up, down)
    else:
        fitted = cores(metric.weighed(vectors), up, metric.weighed(down))
    others = [
        precision.core(shape, core) if bool(energy_of(tau) > 0) else None
        for tau, core in zip(vectors, fitted)
    ]
    errors = [_kept_out(first, delta, tau) for delta, tau in zip(others, vectors)]
    return (first, others), torch.stack(errors)
