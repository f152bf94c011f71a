"""What a merge gives: stored deltas, ranks, the storage account, and a report of what it did."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..deltas.sink import Experts, Shared
from ..deltas.storage import StorageReport


@dataclass(frozen=True)
class RankAllocation:
    """Rank per matrix of the shared module, and per task of the experts."""

    shared: Mapping[str, int]
    experts: Mapping[str, Mapping[str, int]]

    def of(self, stored: Experts) -> "RankAllocation":
        """The same ranks, 0 for experts that were found not to be worth storing."""
        experts = {
            task: {name: k if name in stored[task] else 0 for name, k in ranks.items()}
            for task, ranks in self.experts.items()
        }
        return RankAllocation(self.shared, experts)


@dataclass(frozen=True)
class MergeReport:
    """Errors, precisions, forms and times of a merge.

    Args:
        tasks: sorted; the order of all (T,) tensors.
        energy: per tensor that is merged, (T,) squared norms of the task vectors.
        errors: likewise, (T,) squared norms of what is not reproduced.
        precision: per matrix, and vector that competes with them for bits, how its numbers are quantized.
        forms: per matrix, the name of its storage form.
        subspaces: sizes p and q of the cores of the matrices that are stored in shared bases.
        seconds: per stage.
        tensors: what became of every tensor of every checkpoint, see ``task_vectors/scan.py``.
    """

    tasks: tuple[str, ...]
    energy: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    precision: Mapping[str, str]
    forms: Mapping[str, str]
    subspaces: Mapping[str, tuple[int, int]]
    seconds: Mapping[str, float]
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def relative_error(self) -> float:
        """Energy not reproduced over energy, of all tensors that are merged and tasks."""
        lost = sum(float(e.sum()) for e in self.errors.values())
        return lost / max(sum(float(e.sum()) for e in self.energy.values()), 1e-300)

    @property
    def relative_errors(self) -> dict[str, float]:
        """Relative error per task, but for tasks that have an error and no energy."""
        parts = self._by_task(self.errors), self._by_task(self.energy)
        parts = zip(self.tasks, _relative(*parts).tolist())
        return {task: part for task, part in parts if math.isfinite(part)}

    @property
    def energies(self) -> dict[str, float]:
        """Squared norm of each task vector."""
        return dict(zip(self.tasks, self._by_task(self.energy).tolist()))

    def _by_task(self, found: Mapping[str, Tensor]) -> Tensor:
        """(T,) sums over all tensors."""
        zero = torch.zeros(len(self.tasks), dtype=torch.float64)
        return sum((e.double().cpu() for e in found.values()), zero)

    @property
    def energy_kept(self) -> dict[str, list[float]]:
        """Per matrix, the fraction of each task's energy that is reproduced; of none, all or nothing."""
        lost = {n: _relative(self.errors[n], self.energy[n]) for n in self.forms}
        return {
            n: (1 - x.masked_fill(x.isinf(), 1.0)).tolist() for n, x in lost.items()
        }


def _relative(errors: Tensor, energy: Tensor) -> Tensor:
    """Errors over energies, infinite for an error where there is no energy."""
    return (errors / energy).masked_fill(errors == 0, 0.0)


@dataclass(frozen=True)
class MergeResult:
    """Stored deltas by tensor name, and how they came about."""

    shared: Shared
    experts: Experts
    ranks: RankAllocation
    storage: StorageReport
    report: MergeReport

    def facts(self) -> dict[str, Any]:
        """JSON-plain, as they are saved with the model."""
        report = self.report
        return {
            "relative_error": report.relative_error,
            "relative_errors": report.relative_errors,
            "energies": report.energies,
            "seconds": dict(report.seconds),
            "ranks": asdict(self.ranks),
            "energy_kept": report.energy_kept,
            "energy_tasks": list(report.tasks),
            "precision": dict(report.precision),
            "forms": dict(report.forms),
            "subspaces": dict(report.subspaces),
            "tensors": dict(report.tensors),
        }
