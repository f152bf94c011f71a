"""Data-free refinement of the truncated factors against the stored task vectors, Eq. 14-16.

The objective ``sum_t w_t ||B_0 A_0 + B_t A_t - tau_t||_F^2`` splits per matrix. Letters: ``T`` tasks, ``m`` out, ``n`` in.
A module is ``None`` where it is stored dense: an exact expert is whatever the shared module leaves over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .factors import LowRankFactors
from .svd import balanced, spectrum, subspace_step

Refinement = Literal["alternating", "adam", "none"]


@dataclass(frozen=True)
class RefinementSettings:
    """Settings of the refinement.

    Args:
        sweeps: at most so many rounds of ``alternating``.
        tolerance: stop when a round lowers the loss by less than this fraction.
        steps: of ``adam``.
        lr: of ``adam``, relative to factors of a matrix of unit norm; decays to zero by a cosine.
    """

    sweeps: int = 20
    tolerance: float = 1e-4
    steps: int = 300
    lr: float = 1e-2


@dataclass(frozen=True)
class Modules:
    """The modules of one matrix: shared factors, and per task factors or None for a dense expert."""

    shared: LowRankFactors
    experts: tuple[LowRankFactors | None, ...]

    def errors(self, task_vectors: Sequence[Tensor]) -> Tensor:
        """(T,) squared errors of Eq. 16, unweighted."""
        dense = self.shared.dense()
        return torch.stack(
            [
                (
                    torch.zeros((), device=tau.device)
                    if e is None
                    else (tau - dense - e.dense()).square().sum()
                )
                for tau, e in zip(task_vectors, self.experts)
            ]
        )


def refine(
    modules: Modules,
    task_vectors: Sequence[Tensor],
    *,
    weights: Tensor,
    how: Refinement = "alternating",
    settings: RefinementSettings = RefinementSettings(),
    settled: bool = False,
) -> Modules:
    """Lower the reconstruction error at fixed ranks.

    Args:
        modules: truncated SVDs.
        task_vectors: T of (m, n); read one at a time, but for ``adam``.
        weights: (T,) weights of the squared errors.
        how: ``alternating``: each module in turn is refitted to what the others leave (never raises the loss);
            ``adam``: Eq. 16 by gradient descent, the better of start and end is returned; ``none``.
        settled: the experts given are already the best for the shared module given (they were decomposed against it),
            and not for the whole shared matrix.
    """
    if how == "none":
        return modules
    if how == "alternating":
        return _alternate(modules, task_vectors, weights, settings, settled)
    if how == "adam":
        return _adam(modules, task_vectors, weights, settings)
    raise ValueError(f"refinement={how!r}; choose alternating, adam or none.")


def _alternate(
    modules: Modules,
    task_vectors: Sequence[Tensor],
    weights: Tensor,
    settings: RefinementSettings,
    settled: bool,
) -> Modules:
    if settled and not modules.shared.rank:
        return modules  # nothing couples the tasks
    shared, experts = modules.shared, list(modules.experts)
    weights = weights.to(task_vectors[0])
    # a dense expert takes whatever the shared module leaves, so it has no say in the shared module
    say = weights * torch.tensor(
        [float(e is not None) for e in experts], device=weights.device
    )
    before = float((weights * modules.errors(task_vectors)).sum())
    for sweep in range(settings.sweeps):
        if shared.rank and bool(say.sum() > 0):
            total = torch.zeros_like(task_vectors[0])
            for tau, expert, w in zip(task_vectors, experts, say):
                if expert is not None:
                    total += w * (tau - expert.dense())
            shared = subspace_step(total / say.sum(), shared)
        dense = shared.dense()
        error = 0.0
        for t, (tau, expert, w) in enumerate(zip(task_vectors, experts, weights)):
            if expert is None:
                continue
            rest = tau - dense
            if (
                sweep == 0 and not settled
            ):  # cut for the whole shared matrix, not for its part
                experts[t] = spectrum(rest, max_rank=expert.rank).cut(expert.rank)
            else:
                experts[t] = subspace_step(rest, expert)
            error += float(w * (rest - experts[t].dense()).square().sum())
        if before - error <= settings.tolerance * before or not shared.rank:
            break
        before = error
    return Modules(
        balanced(shared), tuple(None if e is None else balanced(e) for e in experts)
    )


def _adam(
    modules: Modules,
    task_vectors: Sequence[Tensor],
    weights: Tensor,
    settings: RefinementSettings,
) -> Modules:
    low_rank = [t for t, e in enumerate(modules.experts) if e is not None]
    if not low_rank:
        return modules
    targets = torch.stack([task_vectors[t] for t in low_rank])
    w = weights.to(targets)[low_rank]
    size = targets.square().sum().div(len(low_rank)).sqrt()
    if not bool(size > 0) or not bool(w.sum() > 0):
        return modules
    targets, w = targets / size, w / w.sum()
    root = size.sqrt()
    shared = [modules.shared.up / root, modules.shared.down / root]
    up, down = _padded([modules.experts[t] for t in low_rank], targets)
    up, down = up / root, down / root
    parameters = [*shared, up, down]
    parameters = [p.clone() for p in parameters]
    optimiser = torch.optim.Adam(parameters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    for _ in range(settings.steps):
        for p, g in zip(parameters, _factored_gradient(parameters, targets, w)):
            p.grad = g
        optimiser.step()
        schedule.step()
    ranks = [modules.experts[t].rank for t in low_rank]
    experts = list(modules.experts)
    for i, (t, r) in enumerate(zip(low_rank, ranks)):
        experts[t] = LowRankFactors(
            parameters[2][i, :, :r] * root, parameters[3][i, :r] * root
        )
    ended = Modules(
        LowRankFactors(parameters[0] * root, parameters[1] * root), tuple(experts)
    )
    weights = weights.to(targets)
    start_loss = (weights * modules.errors(task_vectors)).sum()
    end_loss = (weights * ended.errors(task_vectors)).sum()
    return ended if bool(end_loss < start_loss) else modules


def _padded(factors: Sequence[LowRankFactors], like: Tensor) -> tuple[Tensor, Tensor]:
    """Stack factors of different ranks; padding columns are zero in both factors, so their gradient stays zero."""
    r = max(f.rank for f in factors)
    up = like.new_zeros(len(factors), like.shape[1], r)
    down = like.new_zeros(len(factors), r, like.shape[2])
    for i, f in enumerate(factors):
        up[i, :, : f.rank] = f.up
        down[i, : f.rank] = f.down
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
