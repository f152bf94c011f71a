"""TALL masks (Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.masks import MaskedDelta
from ...deltas.plain import DenseDelta
from ...deltas.sink import EncodedTensor
from ...errors import UnknownTaskError
from ...options import NonNegative, Share, refuse_idle
from ...task_vectors.loop import Progress
from ...task_vectors.reader import TaskVectors
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod


@auto_register_config
class TallMaskMerging(DynamicMethod):
    """One multi-task vector and one bit per task and entry that tells whether it serves the task.

    ``W_t = W_0 + m_t * tau_mt`` with ``m_t = 1[|tau_t| > lambda_t |tau_mt - tau_t|]`` over all tensors. ``tau_mt`` is
    the sum of the task vectors (``multi_task=task_arithmetic``), or their TIES merge: the largest 20 % of each
    task's entries, the elected sign, the disjoint sum; the mask then compares with the untrimmed ``tau_t``.

    Source: the paper and its released code. The host's class of this name passes full weights where the formula has
    task vectors: on real8 it keeps 86 % of all entries at lambda .6 (its default) and 90 % at .4, where the formula keeps 33
    and 45 % of the sum's. It also materialises T models.

    Inferred: the released code picks ``lambda_t`` from {.2, .3, .4, .5, .6} on the *labels* of a validation split. A
    method has no classifier here, so nothing is tuned: ``threshold`` is the middle of that set, and values found
    elsewhere are given as ``thresholds={task: value}``.
    """

    def __init__(
        self,
        multi_task: Literal["ties", "task_arithmetic"] = "ties",
        ties_keep: Share = 0.2,
        threshold: NonNegative = 0.4,
        thresholds: Mapping[str, NonNegative] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if self.multi_task != "ties":
            of = f"of multi_task=ties, not {self.multi_task}"
            refuse_idle(self, {"ties_keep": of})

    @property
    def title(self) -> str:
        merged = {"ties": "TIES", "task_arithmetic": "task arithmetic"}
        return f"TALL-mask + {merged[self.multi_task]}"

    def prepare(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> None:
        tasks, limits = task_vectors.tasks, dict(self.thresholds or {})
        if unknown := sorted(set(limits) - set(tasks)):
            raise UnknownTaskError(
                f"thresholds has {unknown}; the models are {list(tasks)}."
            )
        if not set(tasks) - set(limits):
            of = "of tasks that thresholds does not name, and it names all"
            refuse_idle(self, {"threshold": of})
        self._limits = [limits.get(task, self.threshold) for task in tasks]
        self._merge: Callable[[Tensor], Tensor] = partial(torch.sum, dim=0)
        if self.multi_task == "ties":
            self._merge = self._ties(task_vectors, names, progress)

    def encode(self, tensor: ChangedTensor) -> EncodedTensor:
        vectors = tensor.stacked()
        merged = self._merge(vectors)
        masks = [
            MaskedDelta.of(task_mask(tau, merged, limit).cpu())
            for tau, limit in zip(vectors, self._limits)
        ]
        shared = DenseDelta.of(tensor.shape, merged, tensor.dtype)
        return EncodedTensor(tensor.name, shared, masks)

    def _ties(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> Callable[[Tensor], Tensor]:
        """The TIES merge of one tensor, after one pass for the thresholds and one for the majority sign."""
        device, tasks, found = self.fabric.device, len(task_vectors.tasks), []
        for task in range(tasks):
            read = (self.read(task_vectors, name, task) for name in names)
            sizes = torch.cat([entries.flatten().abs() for entries in read])
            found.append(trim_threshold(sizes, self.ties_keep))
            progress("trimming", task, tasks)
        thresholds, votes = torch.tensor(found, device=device), 0.0
        for i, name in enumerate(names):
            trimmed = trim(task_vectors.read(name, device), thresholds)
            votes += trimmed.sum(0).sign().sum().item()
            progress("electing signs", i, len(names))
        majority = float(torch.tensor(votes).sign())
        return lambda vectors: elected_sum(trim(vectors, thresholds), majority)


def trim_threshold(sizes: Tensor, keep: float) -> float:
    """The smallest absolute value that :func:`trim` keeps.

    Args:
        sizes: (n,) absolute values of all entries of one task.
        keep: fraction of them to keep. As in the released code, the entry next in size is kept too.
    """
    dropped = len(sizes) - int(keep * len(sizes))
    return float(sizes.kthvalue(max(dropped, 1)).values)


def trim(vectors: Tensor, thresholds: Tensor) -> Tensor:
    """Zero what is below the task's threshold.

    Args:
        vectors: (T, ...).
        thresholds: (T,).
    """
    limits = thresholds.view(-1, *[1] * (vectors.ndim - 1))
    return torch.where(vectors.abs() >= limits, vectors, 0.0)


def elected_sum(trimmed: Tensor, majority: float = 1.0) -> Tensor:
    """Elect the sign of the sum, then add the entries that agree with it (TIES with a disjoint sum).

    Args:
        trimmed: (T, ...).
        majority: the sign where the sum is zero: that of the sum of all elected signs of the model.
    """
    sign = trimmed.sum(0).sign()
    sign = torch.where(sign == 0, majority, sign)
    agree = torch.where(sign > 0, trimmed > 0, trimmed < 0)
    return (trimmed * agree).sum(0)


def task_mask(vector: Tensor, merged: Tensor, threshold: float) -> Tensor:
    """Where the multi-task vector serves the task: ``|tau_t| > lambda |tau_mt - tau_t|``."""
    return vector.abs() > threshold * (merged - vector).abs()
