"""TIES merging (Yadav et al., NeurIPS 2023) and TALL masks (Wang et al., ICML 2024) of flat task vectors.

Both look at all entries of a model together. What couples the tensors is a threshold per task and one sign, so a model
is worked through tensor by tensor.
"""

import torch
from torch import Tensor


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
