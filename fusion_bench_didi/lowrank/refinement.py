"""Data-free refinement of the truncated factors against the stored task vectors, Eq. 14-16.

The objective ``sum_t w_t ||B_0 A_0 + B_t A_t - tau_t||_F^2`` splits per matrix. Letters: ``T`` tasks, ``m`` out, ``n`` in.
A module is ``None`` where it is stored dense: an exact expert is whatever the shared module leaves over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options import Count, NonNegative, Positive, check_fields
from .factored import Densified, JointBasis, all_factored
from .factors import LowRankFactors, Matrix, energy_of
from .subspace_iteration import Subspace
from .svd import half_svd

#: How factors are refitted: ``alternating`` least squares, exact per module; ``adam`` as in the paper; not at all.
Refinement = Literal["alternating", "adam", "none"]

#: Directions that ``alternating`` follows per direction kept: more of the shared module, on which all others wait.
FOLLOWING_SHARED, FOLLOWING_OWN = 2.5, 1.3


@dataclass(frozen=True)
class RefinementSettings:
    """Sweeps, steps and tolerance of the refinement.

    Args:
        sweeps: at most so many rounds of ``alternating``.
        tolerance: stop when a round lowers the loss by less than this fraction.
        steps: of ``adam``.
        lr: of ``adam``, relative to factors of a matrix of unit norm; decays to zero by a cosine.
    """

    sweeps: Count = 20
    tolerance: NonNegative = 3e-5
    steps: Count = 300
    lr: Positive = 1e-2

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class FactorSet:
    """The modules of one matrix: shared factors, and per task factors or None for a dense expert."""

    shared: LowRankFactors
    experts: tuple[LowRankFactors | None, ...]

    def mapped(
        self, function: Callable[[LowRankFactors], LowRankFactors]
    ) -> "FactorSet":
        """A factor set whose low-rank modules were put through a function."""
        experts = (None if e is None else function(e) for e in self.experts)
        return FactorSet(function(self.shared), tuple(experts))

    def errors(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """(T,) squared errors of Eq. 16, unweighted."""
        dense = self.shared.dense()
        none = dense.new_zeros(())
        return torch.stack(
            [
                none if e is None else (tau - dense - e.dense()).square().sum()
                for tau, e in zip(task_vectors, self.experts)
            ]
        )


def refine(
    modules: FactorSet,
    task_vectors: Sequence[Matrix],
    *,
    weights: Tensor,
    how: Refinement = "alternating",
    settings: RefinementSettings = RefinementSettings(),
    residual_to_stored: bool = False,
) -> FactorSet:
    """Lower the reconstruction error at fixed ranks.

    Args:
        modules: truncated SVDs.
        task_vectors: T of (m, n); read one at a time, but for ``adam``. Where all are factored, all of it happens in
            the frame around them.
        weights: (T,) weights of the squared errors.
        how: ``alternating``: each module in turn is refitted to what the others leave, by one step of subspace iteration
            from where it is; the best sweep is returned, so the loss never rises;
            ``adam``: Eq. 16 by gradient descent, the better of start and end is returned; ``none``.
        residual_to_stored: the experts given are already the best for the shared module given (they were decomposed against it),
            and not for the whole shared matrix.
    """
    ways = {"alternating": _alternate, "adam": _adam}
    if how == "none":
        return modules
    if how not in ways:
        raise ValueError(f"refinement={how!r}; choose alternating, adam or none.")
    if how == "alternating" and residual_to_stored and not modules.shared.rank:
        return modules  # nothing couples the tasks
    if not all_factored(task_vectors):
        return ways[how](modules, Densified(task_vectors), weights, settings)
    frame = JointBasis.around(task_vectors)
    inside, cores = modules.mapped(frame.inside), frame.cores(task_vectors)
    return ways[how](inside, cores, weights, settings).mapped(frame.outside)


def _alternate(
    modules: FactorSet,
    task_vectors: Sequence[Tensor],
    weights: Tensor,
    settings: RefinementSettings,
) -> FactorSet:
    shared, experts = modules.shared, list(modules.experts)
    low_rank = [t for t, e in enumerate(experts) if e is not None]
    if not shared.rank:
        for t in low_rank:
            found = half_svd(task_vectors[t], max_rank=experts[t].rank)
            experts[t] = found.factors(task_vectors[t], experts[t].rank)
        return FactorSet(shared, tuple(experts))
    # a dense expert takes whatever the shared module leaves, so it has no say in the shared module
    say = {t: float(weights[t]) for t in low_rank}
    total = sum(say.values())
    if total <= 0:
        return modules
    share = {t: w / total for t, w in say.items()}
    mean = torch.zeros_like(task_vectors[0])
    for t in low_rank:
        mean.add_(task_vectors[t], alpha=share[t])
    # matrices made anew in the loop would cost as much time as products
    earlier, left, dense, rest = (torch.empty_like(mean) for _ in range(4))

    def leave(out: Tensor) -> Tensor:
        """The weighted mean of task vectors minus experts: what is left to be shared."""
        up = torch.cat([experts[t].up * share[t] for t in low_rank], 1)
        down = torch.cat([experts[t].down for t in low_rank])
        return torch.addmm(mean, up, down, alpha=-1, out=out)

    def unshared(t: int) -> Tensor:
        return torch.sub(task_vectors[t], dense, out=rest)

    earlier.copy_(leave(left))
    torch.mm(shared.up, shared.down, out=dense)
    before = 0.0
    for t in low_rank:
        error = unshared(t).addmm_(experts[t].up, experts[t].down, alpha=-1)
        before += say[t] * float(energy_of(error))
    best = before
    result, falls = modules, 0
    common = Subspace(shared, following=FOLLOWING_SHARED)
    own = {
        t: Subspace(experts[t], following=FOLLOWING_OWN)
        for t in low_rank
        if experts[t].rank
    }
    for _ in range(settings.sweeps):
        # on in the direction of the last step, the further the longer the loss has been falling
        ahead = torch.lerp(earlier, left, 1 + falls / (falls + 1), out=rest)
        shared, _ = common.step(ahead)
        torch.mm(shared.up, shared.down, out=dense)
        error = 0.0
        for t in low_rank:
            kept, target = 0.0, unshared(t)
            if t in own:
                experts[t], kept = own[t].step(target)
            error += say[t] * max(float(energy_of(target)) - kept, 0.0)
        earlier, left = left, leave(earlier)
        if error < best:
            best, result = error, FactorSet(shared, tuple(experts))
        falls = falls + 1 if error < before else 0
        if abs(before - error) <= settings.tolerance * before:
            break
        before = error
    return result


def _adam(
    modules: FactorSet,
    task_vectors: Sequence[Tensor],
    weights: Tensor,
    settings: RefinementSettings,
) -> FactorSet:
    low_rank = [t for t, e in enumerate(modules.experts) if e is not None]
    if not low_rank:
        return modules
    targets = torch.stack([task_vectors[t] for t in low_rank])
    w = weights.to(targets)[low_rank]
    size = targets.square().sum().div(len(low_rank)).sqrt()
    if not bool(size > 0) or not bool(w.sum() > 0):
        return modules
    targets, w, root = targets / size, w / w.sum(), size.sqrt()
    shared, experts = modules.shared, list(modules.experts)
    stacks = _padded([experts[t] for t in low_rank])
    parameters = [part / root for part in (shared.up, shared.down, *stacks)]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in range(settings.steps):
        for p, g in zip(parameters, _factored_gradient(parameters, targets, w)):
            p.grad = g
        optimizer.step()
        schedule.step()
    b0, a0, b, a = parameters
    for i, t in enumerate(low_rank):
        r = experts[t].rank
        experts[t] = LowRankFactors(b[i, :, :r] * root, a[i, :r] * root)
    ended = FactorSet(LowRankFactors(b0 * root, a0 * root), tuple(experts))

    def loss(modules: FactorSet) -> Tensor:
        return (weights.to(targets) * modules.errors(task_vectors)).sum()

    return ended if bool(loss(ended) < loss(modules)) else modules


def _padded(factors: Sequence[LowRankFactors]) -> tuple[Tensor, Tensor]:
    """Stack factors of different ranks; padding columns are zero in both factors, so their gradient stays zero."""
    r = max(f.rank for f in factors)
    up = torch.stack([F.pad(f.up, (0, r - f.rank)) for f in factors])
    down = torch.stack([F.pad(f.down, (0, 0, 0, r - f.rank)) for f in factors])
    return up, down


def _factored_gradient(
    parameters: Sequence[Tensor], targets: Tensor, w: Tensor
) -> list[Tensor]:
    """Gradient of ``sum_t w_t ||B_0 A_0 + B_t A_t - tau_t||^2``; products with tau_t only, no dense reconstruction."""
    b0, a0, b, a = parameters
    two_w = 2 * w[:, None, None]
    gram_a0a = a0 @ a.mT  # (T, r0, r)
    gram_bb0 = b0.mT @ b  # (T, r0, r)
    db = two_w * (b0 @ gram_a0a + b @ (a @ a.mT) - targets @ a.mT)
    da = two_w * (gram_bb0.mT @ a0 + (b.mT @ b) @ a - b.mT @ targets)
    mean = torch.einsum("t,tmn->mn", w, targets)
    w1 = w[:, None, None]
    db0 = 2 * (
        w.sum() * b0 @ (a0 @ a0.mT) + (w1 * (b @ gram_a0a.mT)).sum(0) - mean @ a0.mT
    )
    da0 = 2 * (
        w.sum() * (b0.mT @ b0) @ a0 + (w1 * (gram_bb0 @ a)).sum(0) - b0.mT @ mean
    )
    return [db0, da0, db, da]
