"""Tensors that are mixed from task changes, and batches that are sorted by their weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..deltas import Delta, LowRankDelta, SpectralDelta
from ..lowrank.quantisation import unpack_nibbles
from ..quantised import RoundedLowRankDelta

MAX_GROUPS = (
    2  # times T: with more distinct rows than that, rows count as all different
)


@dataclass(frozen=True)
class Group:
    """Samples of equal weights, side by side in the sorted batch."""

    where: slice
    weights: Tensor  # (T,)

    @property
    def size(self) -> int:
        return self.where.stop - self.where.start

    @cached_property
    def task(self) -> int | None:
        """The task, if the weights are one-hot."""
        active = self.active
        if len(active) == 1 and self.weights[active[0]] == 1:
            return active[0]
        return None

    @cached_property
    def active(self) -> list[int]:
        """The tasks that take part."""
        return self.weights.nonzero().squeeze(1).tolist()


@dataclass(frozen=True)
class Routing:
    """What a batch is mixed by.

    Args:
        weights: (B, T), as given.
        order: (B,) positions of the given batch, sorted; ``back`` is its inverse.
        groups: over the sorted batch.
    """

    weights: Tensor
    order: Tensor
    back: Tensor
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, weights: Tensor) -> "Routing":
        rows, which, counts = weights.unique(
            dim=0, return_inverse=True, return_counts=True
        )
        order = which.argsort(stable=True)
        groups, start = [], 0
        for row, count in zip(rows, counts.tolist()):
            groups.append(Group(slice(start, start + count), row))
            start += count
        return cls(weights, order, order.argsort(), tuple(groups))

    @property
    def few(self) -> bool:
        """Whether running group by group is worth it."""
        return len(self.groups) <= MAX_GROUPS * self.weights.shape[1]

    @cached_property
    def sorted(self) -> Tensor:
        return self.weights[self.order]  # (B, T)

    def probe(self, count: int = 4) -> Tensor:
        """Positions of one sample from each of a few groups."""
        starts = [group.where.start for group in self.groups[:count]]
        return self.order[starts]


class Table:
    """One tensor of the backbone and its value under each task.

    Args:
        common: base plus shared change.
        tasks: per task ``(up, down)`` with change ``up @ down``, the dense value of the tensor, or None for
            ``common``.
    """

    def __init__(
        self, common: Tensor, tasks: Sequence[tuple[Tensor, Tensor] | Tensor | None]
    ):
        self.common, self.tasks = common, list(tasks)
        self._stacks: tuple[Tensor, ...] | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        base: Tensor,
        shared: Delta | None,
        deltas: Sequence[Delta | None],
        shared_scale: float = 1.0,
    ) -> "Table":
        """In the base's data type and on its device, computed in float32."""
        whole = None if shared is None else shared.change()
        common = base.float()
        if whole is not None:
            common = common + shared_scale * whole
        tasks: list[tuple[Tensor, Tensor] | Tensor | None] = []
        for delta in deltas:
            factors = None if delta is None else factors_of(delta)
            if factors is not None and base.ndim == 2:
                tasks.append(tuple(f.to(base.dtype) for f in factors))
            elif delta is None:
                tasks.append(None)
            else:
                added = delta.change(whole)
                added = added if whole is None else added - whole
                tasks.append((common + added).to(base.dtype))
        return cls(common.to(base.dtype), tasks)

    @property
    def factored(self) -> bool:
        return all(isinstance(task, tuple) for task in self.tasks)

    def value(self, task: int) -> Tensor:
        """The dense tensor of one task."""
        kept = self.tasks[task]
        if kept is None:
            return self.common
        if isinstance(kept, tuple):
            return self.common + (kept[0] @ kept[1]).view(self.common.shape)
        return kept

    def mixed(self, group: "Group") -> Tensor:
        """The dense tensor under one row of weights, ``common + sum_t w_t (value_t - common)``."""
        if group.task is not None:
            return self.value(group.task)
        value = self.common
        for task in group.active:
            change = self.value(task) - self.common
            value = value + group.weights[task].to(value) * change
        return value

    def rows(self, weights: Tensor) -> Tensor:
        """A small tensor for every sample.

        Args:
            weights: (B, T).

        Returns:
            (B, *shape).
        """
        if self._stacks is None:
            changes = [self.value(t) - self.common for t in range(len(self.tasks))]
            self._stacks = (torch.stack(changes),)
        mixed = torch.tensordot(weights.to(self.common), self._stacks[0], 1)
        return self.common + mixed

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All tasks' factors side by side: up (m, R), down (R, n), and the task of each of the R directions."""
        if self._stacks is None:
            up = torch.cat([kept[0] for kept in self.tasks], 1)
            down = torch.cat([kept[1] for kept in self.tasks], 0)
            ranks = torch.tensor([kept[0].shape[1] for kept in self.tasks])
            owner = torch.arange(len(self.tasks)).repeat_interleave(ranks)
            self._stacks = (up, down, owner.to(up.device))
        return self._stacks


def factors_of(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """(up, down) in float32 if they hold at most half as many values as the matrix.

    Above that the dense matrix is faster: it replaces the common product, factors come on top of it.
    """
    if isinstance(delta, RoundedLowRankDelta):
        m, n = delta.shape[0], delta.numel // delta.shape[0]
        up, down = delta.up, delta.down
        if delta.width == 4:
            up = unpack_nibbles(up, (m, delta.rank))
            down = unpack_nibbles(down, (delta.rank, n))
        up, down = up.float() * delta.scale, down.float()
    elif isinstance(delta, SpectralDelta):
        up, down = delta.up.float() * delta.sigma.float(), delta.down.float()
    elif isinstance(delta, LowRankDelta):
        up, down = delta.up.float(), delta.down.float()
    else:
        return None
    small = 2 * (up.numel() + down.numel()) <= delta.numel
    return (up, down) if small else None


def regrouped(value: Any, index: Tensor, size: int) -> Any:
    """Rows ``index`` of every tensor whose first side is ``size``, in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value[index] if value.ndim and len(value) == size else value
    if isinstance(value, Mapping):
        picked = {key: regrouped(v, index, size) for key, v in value.items()}
        return type(value)(**picked)
    if isinstance(value, (tuple, list)):
        return type(value)(regrouped(v, index, size) for v in value)
    return value
