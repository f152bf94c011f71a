"""Ranks learned by gradient descent through a smooth truncation of singular values, Eq. 8 to 13."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..options import Count, NonNegative, Positive, Scale, check_fields
from .spectra import MatrixSpectra
from .water_filling import scale_to_budget

log = logging.getLogger(__name__)


def gate(rank: Tensor, size: int, *, beta: float, shift: float = 0.5) -> Tensor:
    """``w_i(k) = 0.5 tanh(beta (k + shift - i)) + 0.5`` for i = 1..size.

    Eq. 8 has no shift: the middle of the step then lies on component k itself, and with large beta half of the k-th
    singular value is lost. Shifted by half a rank w(k) passes through 1/2 between the components k and k + 1, so that an
    integer k keeps exactly k of them: as beta grows it becomes the hard truncation.

    Args:
        rank: (...) continuous ranks k.
        size: number of singular values q.
        beta: steepness, per rank.
        shift: in ranks.

    Returns:
        (..., q) weights in [0, 1].
    """
    index = torch.arange(1, size + 1, device=rank.device, dtype=rank.dtype)
    return 0.5 * torch.tanh(beta * (rank[..., None] + shift - index)) + 0.5


def hard_gate(rank: Tensor, size: int) -> Tensor:
    """The limit of :func:`gate` for beta to infinity at integer ranks: 1 for i <= k, else 0."""
    index = torch.arange(1, size + 1, device=rank.device, dtype=torch.float32)
    return (index <= rank[..., None]).to(torch.float32)


@dataclass(frozen=True)
class LearningSettings:
    """Settings of the rank stage.

    Args:
        steps: Adam steps.
        lr: Adam's step in units of a matrix's full rank; decays to zero by a cosine.
        beta_start, beta_end: steepness of the truncation, annealed geometrically; per rank.
        penalty: lambda of Eq. 13 on ``|R - R_target|`` beside the energy-normalized loss.
        coupled: keep the cross terms between shared and experts.
        shift: of the truncation, see :func:`gate`; 0 is Eq. 8.
        fallback: the start is returned where it serves the exact objective better than what was learned from it.
    """

    steps: Count = 300
    lr: Positive = 0.01
    beta_start: Positive = 0.5
    beta_end: Positive = 10.0
    penalty: NonNegative = 10.0
    coupled: bool = True
    shift: Scale = 0.5
    fallback: bool = True

    def __post_init__(self):
        check_fields(self)


def truncation_error(row: MatrixSpectra, ranks: Tensor) -> Tensor:
    """(T,) squared error of each task at integer ranks (T + 1,), unweighted and exact."""
    q = row.sigma.shape[1]
    lost = (1 - hard_gate(ranks, q)) * row.sigma
    return _quadratic(_Group.of([row]), lost[None], (ranks >= row.full)[None])[0]


def learn_ranks(
    table: Sequence[MatrixSpectra],
    budget: int,
    *,
    start: Sequence[Tensor],
    settings: LearningSettings = LearningSettings(),
    unit: int | None = None,
) -> list[Tensor]:
    """Learn a continuous rank for every module, then scale all to the exact budget.

    The smooth loss is blind between the break-even rank and full rank (where a module is stored dense), so that what is
    learned may serve the exact objective worse than its start does, scaled alike: ``fallback`` then returns the start. A
    line in the log says which was returned, and both objectives.

    Args:
        budget: bits.
        start: (T + 1,) ranks per matrix to start from.
        unit: bits in which R of Eq. 12-13 is measured; the dense size of all matrices if None.

    Returns:
        (T + 1,) integer ranks per matrix, never above the budget.
    """
    if not table:
        return []
    unit = unit or sum(row.rate.dense for row in table)
    with torch.inference_mode(False), torch.enable_grad():
        groups = _grouped(table, settings.coupled)
        fractions = [
            torch.stack([start[i] / table[i].full for i in g.members])
            .clamp(0.0, 1.0)
            .requires_grad_(True)
            for g in groups
        ]
        _descend(groups, fractions, budget, unit, settings)
    learned: list[Tensor] = [torch.empty(0)] * len(table)
    for group, fraction in zip(groups, fractions):
        for i, k in zip(group.members, (fraction.detach() * group.like.full).unbind()):
            learned[i] = k
    learned = scale_to_budget(table, learned, budget)
    begun = scale_to_budget(table, start, budget)
    after, before = objective(table, learned), objective(table, begun)
    better = settings.fallback and before < after
    log.info(
        "rank stage: weighted squared error %.6g by learned ranks, %.6g by those of the start; the %s ranks are taken",
        after,
        before,
        "start's" if better else "learned",
    )
    return begun if better else learned


def _descend(
    groups: Sequence["_Group"],
    fractions: Sequence[Tensor],
    budget: int,
    unit: int,
    settings: LearningSettings,
) -> None:
    """Adam on the smooth loss of Eq. 11-13; fractions of full rank (G, T + 1) are changed in place."""
    energy = sum(float(g.weighted_energy()) for g in groups)
    optimizer = torch.optim.Adam(fractions, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    growth = settings.beta_end / settings.beta_start
    for step in range(settings.steps):
        progress = step / max(settings.steps - 1, 1)
        beta = settings.beta_start * growth**progress
        optimizer.zero_grad()
        loss, cost = torch.zeros(()), torch.zeros(())
        for group, fraction in zip(groups, fractions):
            k = fraction * group.like.full  # (G, T + 1)
            loss = loss + group.error(k, beta=beta, shift=settings.shift)
            rate = group.like.rate
            cost = cost + (k * rate.per_rank).clamp(max=rate.dense).sum()
        ratio = cost / unit
        (loss / energy + settings.penalty * (ratio - budget / unit).abs()).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for group, fraction in zip(groups, fractions):
                fraction.clamp_(0.0, 1.0)
                fixed = group.shared_rank
                fraction[fixed >= 0, 0] = fixed[fixed >= 0] / group.like.full


def objective(table: Sequence[MatrixSpectra], ranks: Sequence[Tensor]) -> float:
    """Eq. 11 at integer ranks: the weighted squared error, exact."""
    errors = zip(table, ranks)
    return sum(float(row.weights @ truncation_error(row, k)) for row, k in errors)


@dataclass(frozen=True)
class _Group:
    """Matrices of equal shape and rate, stacked.

    Args:
        members: where in the table they are.
        like: one of them.
    """

    members: Sequence[int]
    like: MatrixSpectra
    sigma: Tensor  # (G, T + 1, q)
    tail_energy: Tensor  # (G, T + 1)
    weights: Tensor  # (G, T)
    shared_rank: Tensor  # (G,) rank, -1 where it is learned
    coupling: tuple[Tensor, ...] | None

    @classmethod
    def of(
        cls,
        rows: Sequence[MatrixSpectra],
        members: Sequence[int] = (),
        coupled: bool = True,
    ) -> "_Group":
        def stacked(name: str, found: Sequence[Any] = rows) -> Tensor:
            return torch.stack([getattr(one, name) for one in found])

        couplings, parts = [row.coupling for row in rows], None
        if coupled and None not in couplings:
            names = ("head", "shared_tail", "expert_tail", "tail")
            device = rows[0].sigma.device
            parts = tuple(stacked(name, couplings).to(device) for name in names)
        settled = [-1 if row.shared_rank is None else row.shared_rank for row in rows]
        own = map(stacked, ("sigma", "tail_energy", "weights"))
        return cls(members, rows[0], *own, torch.tensor(settled), parts)

    def weighted_energy(self) -> Tensor:
        """``sum w_t ||tau_t||^2`` by the quadratic form at rank 0, which keeps nothing."""
        return (self.weights * _quadratic(self, self.sigma)).sum()

    def error(self, k: Tensor, *, beta: float, shift: float = 0.5) -> Tensor:
        """Weighted squared error at continuous ranks k (G, T + 1), Eq. 11."""
        kept = gate(k, self.sigma.shape[-1], beta=beta, shift=shift)
        lost = (1 - kept) * self.sigma
        return (self.weights * _quadratic(self, lost)).sum()


def _grouped(table: Sequence[MatrixSpectra], coupled: bool) -> list[_Group]:
    by_shape: dict[tuple, list[int]] = {}
    for i, row in enumerate(table):
        by_shape.setdefault((row.shape, row.rate, row.sigma.shape), []).append(i)
    return [_Group.of([table[i] for i in m], m, coupled) for m in by_shape.values()]


def _quadratic(group: _Group, lost: Tensor, exact: Tensor | None = None) -> Tensor:
    """(G, T) error from the lost singular values (G, T + 1, q); modules marked exact (G, T + 1) lose no tail either."""
    tailed = torch.ones_like(group.tail_energy)
    if exact is not None:
        tailed = tailed * ~exact
    tails = group.tail_energy * tailed
    shared, experts = lost[:, 0], lost[:, 1:]
    error = shared.square().sum(-1)[:, None] + experts.square().sum(-1)
    error = error + tails[:, :1] + tails[:, 1:]
    if group.coupling is not None:
        head, shared_tail, expert_tail, tail = group.coupling
        pair = shared.to(head.dtype), experts.to(head.dtype)
        cross = torch.einsum("gi,gtij,gtj->gt", pair[0], head, pair[1]).float()
        cross = cross + tailed[:, 1:] * torch.einsum("gi,gti->gt", shared, shared_tail)
        cross = cross + tailed[:, :1] * (experts * expert_tail).sum(-1)
        cross = cross + tailed[:, :1] * tailed[:, 1:] * tail
        error = error + 2 * cross
    return error
