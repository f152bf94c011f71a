"""TALL masks (Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024).

Example:

    fusion_bench method=didi/tall_mask method.multi_task=ties \
        modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.base import Delta
from ...deltas.masks import MaskedDelta
from ...deltas.plain import DenseDelta
from ...errors import UnknownTaskError
from ...task_vectors.reader import TaskVectors
from ..base import DynamicMethod, Stored


@auto_register_config
class TallMaskMerging(DynamicMethod):
    """One multi-task vector and one bit per task and entry that tells whether it serves the task.

    ``W_t = W_0 + m_t * tau_mt`` with ``m_t = 1[|tau_t| > lambda_t |tau_mt - tau_t|]`` over all tensors. ``tau_mt`` is
    the sum of the task vectors (``multi_task=task_arithmetic``), or their TIES merge: the largest 20 % of each
    task's entries, the elected sign, the disjoint sum; the mask then compares with the untrimmed ``tau_t``.

    Source: the paper and its released code. The host's class of this name passes full weights where the formula has
    task vectors, keeps 97 % of all entries instead of about a third, and materialises T models.

    Inferred: the released code picks ``lambda_t`` from {.2, .3, .4, .5, .6} on the *labels* of a validation split. A
    method has no classifier here, so nothing is tuned: ``threshold`` is the middle of that set, and values found
    elsewhere are given as ``thresholds={task: value}``.

    Args: as the keys of ``config/method/didi/tall_mask.yaml``.
    """

    def __init__(
        self,
        multi_task: Literal["ties", "task_arithmetic"] = "ties",
        ties_keep: float = 0.2,
        threshold: float = 0.4,
        thresholds: Mapping[str, float] | None = None,
        exclude: Sequence[str] = (),
        task_aliases: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if multi_task not in ("ties", "task_arithmetic"):
            raise ValueError(
                f"multi_task={multi_task!r}; choose ties or task_arithmetic."
            )
        if not 0 < ties_keep <= 1:
            raise ValueError(f"ties_keep={ties_keep} is not in (0, 1].")

    @property
    def title(self) -> str:
        merged = {"ties": "TIES", "task_arithmetic": "task arithmetic"}
        return f"TALL-mask + {merged[self.multi_task]}"

    def compress(self, task_vectors: TaskVectors, names: Sequence[str]) -> Stored:
        tasks, device = task_vectors.tasks, self.fabric.device
        limits = dict(self.thresholds or {})
        if unknown := sorted(set(limits) - set(tasks)):
            raise UnknownTaskError(
                f"thresholds has {unknown}; the models are {list(tasks)}."
            )
        merge = partial(torch.sum, dim=0)
        if self.multi_task == "ties":
            merge = self._ties(task_vectors, names)
        shared: dict[str, Delta] = {}
        experts: dict[str, dict[str, Delta]] = {task: {} for task in tasks}
        for name in self.track(names, "masks"):
            vectors = task_vectors.read(name, device)
            merged = merge(vectors)
            dtype = task_vectors.tuned_dtype(name)
            shared[name] = DenseDelta(tuple(merged.shape), merged.to(dtype).cpu())
            for task, tau in zip(tasks, vectors):
                mask = task_mask(tau, merged, limits.get(task, self.threshold))
                experts[task][name] = MaskedDelta.of(mask.cpu())
        return Stored(shared, experts)

    def _ties(self, task_vectors: TaskVectors, names: Sequence[str]):
        """The TIES merge of one tensor, after one pass for the thresholds and one for the majority sign."""
        device = self.fabric.device
        thresholds = torch.tensor(
            [
                trim_threshold(
                    _sizes(task_vectors, names, task, device), self.ties_keep
                )
                for task in self.track(task_vectors.tasks, "trimming")
            ],
            device=device,
        )
        votes = sum(
            trim(task_vectors.read(name, device), thresholds).sum(0).sign().sum().item()
            for name in self.track(names, "electing signs")
        )
        majority = float(torch.tensor(votes).sign())
        return lambda vectors: elected_sum(trim(vectors, thresholds), majority)


def _sizes(
    task_vectors: TaskVectors, names: Sequence[str], task: str, device
) -> Tensor:
    """Absolute values of all entries of one task vector, flat."""
    parts = []
    for name in names:
        base = task_vectors.read_base(name).to(device, torch.float32)
        tuned = task_vectors.read_tuned(name, task).to(device, torch.float32)
        parts.append((tuned - base).abs().flatten())
    return torch.cat(parts)


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
