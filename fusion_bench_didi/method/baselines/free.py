"""FREE-Merging (Zheng & Wang, "Fourier Transform for Efficient Model Merging", ICCV 2025, arXiv 2411.16815).

Example:

    fusion_bench method=didi/free modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \
        taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8
"""

import fnmatch
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.masks import SparseDelta
from ...deltas.plain import DenseDelta
from ...deltas.sink import EncodedTensor
from ...errors import ModelPoolError
from ...task_vectors.loop import Progress
from ...task_vectors.reader import TaskVectors
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod

#: values of keys that are left open, by filter
PUBLISHED = {
    "paper": {"cutoff": 0.1, "shared_scale": 1.0, "expert_scale": 1.0},
    "code": {"cutoff": 0.7, "shared_scale": 0.25, "expert_scale": 0.5},
}


@auto_register_config
class FreeMerging(DynamicMethod):
    """A backbone of high-pass filtered task vectors, and per task a sparse rescaled expert; the task is given.

    For every attention and MLP weight: ``v_t = highpass(tau_t)``, ``S = s sum_t c_t v_t``, and the expert
    ``e_t = s_e mu_t TopK_d(tau_t)`` of each row's largest ``d`` = 1 % with
    ``mu_t = -log10(d) E|kept tau_t| / E|v_t|``. Where the expert is non-zero it replaces S. All else stays at W_0.
    ``W_0 + S`` is stored once (``folded``).

    ``filter=paper`` (default): the ideal high-pass on the frequency radius, ``c_t = E|v_t| / sum_j E|v_j|``, no other
    scales. ``filter=code``: the released filter, ``c_t = 1`` and the code's own ``s = .25``, ``s_e = .5``. The paper's is the default because it treats
    all shapes alike; the released one removes 0.02 % of the frequencies of a square matrix but 68 % of a 4:1 one, so
    that its result depends on whether Q, K and V are stored in one tensor or in three.

    Source: the released code and the paper's two formulas. Inferred: the paper's cutoff (.1 of the highest frequency);
    ``mu_t`` as the code simplifies it (the paper divides by ``lambda_t E|tau_t|``); attention and MLP biases are
    averaged (the code takes the first task's). Left out: the router (a ResNet-18 whose weights are not released).

    Args: as the keys of ``config/method/didi/free.yaml``.
    """

    title = "FREE-Merging"
    folded = True

    def __init__(
        self,
        filter: Literal["paper", "code"] = "paper",
        cutoff: float | None = None,
        shared_scale: float | None = None,
        keep: float = 0.01,
        expert_scale: float | None = None,
        patterns: Sequence[str] = ("*attn*", "*mlp*"),
        biases: Literal["mean", "pretrained"] = "mean",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if filter not in PUBLISHED:
            raise ValueError(f"filter={filter!r}; choose paper or code.")
        if biases not in ("mean", "pretrained"):
            raise ValueError(f"biases={biases!r}; choose mean or pretrained.")
        if not 0 < keep < 1:
            raise ValueError(f"keep={keep} is not between 0 and 1.")

    def prepare(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> None:
        patterns = list(self.patterns)
        if not any(map(self._filtered, names)):
            raise ModelPoolError(
                f"No changed tensor matches patterns={patterns}; there are {list(names[:4])} ... "
                "Name the attention and MLP tensors of this architecture."
            )

    def encode(self, tensor: ChangedTensor) -> EncodedTensor | None:
        if not self._filtered(tensor.name):
            return None
        vectors, shape, dtype = tensor.stacked(), tensor.shape, tensor.dtype
        nothing = [None] * len(vectors)
        if min(tensor.sides) < 2:
            if self.biases == "pretrained":
                return None
            mean = DenseDelta(shape, vectors.mean(0).to(dtype).cpu())
            return EncodedTensor(tensor.name, mean, nothing)
        matrices = vectors.view(len(vectors), *tensor.sides)  # (T, m, n)
        filtered = high_pass(matrices, self._filter(*tensor.sides))
        experts = []
        for tau, v in zip(matrices, filtered):
            sparse = top_of_rows(tau, self.keep)
            factor = compensation(sparse, v, self.keep)
            value = (self._value("expert_scale") * factor * sparse).view(shape)
            experts.append(SparseDelta.of(value.cpu(), dtype))
        merged = self._merged(filtered).to(dtype).cpu()
        return EncodedTensor(tensor.name, DenseDelta(shape, merged), experts)

    def _filtered(self, name: str) -> bool:
        """Whether a tensor takes part."""
        return any(fnmatch.fnmatchcase(name, p) for p in self.patterns)

    def _value(self, key: str) -> float:
        given = getattr(self, key)
        return PUBLISHED[self.filter][key] if given is None else given

    def _filter(self, m: int, n: int) -> Tensor:
        passing = ideal_filter if self.filter == "paper" else released_filter
        return passing(m, n, self._value("cutoff"))

    def _merged(self, filtered: Tensor) -> Tensor:
        """``s sum_t c_t v_t``, (m, n)."""
        coefficients = filtered.new_ones(len(filtered))
        if self.filter == "paper":
            sizes = filtered.abs().mean((1, 2))  # (T,)
            coefficients = sizes / sizes.sum().clamp(min=1e-30)
        merged = torch.einsum("t,tmn->mn", coefficients, filtered)
        return self._value("shared_scale") * merged


def ideal_filter(m: int, n: int, cutoff: float) -> Tensor:
    """The paper's ideal high-pass: which frequencies are kept, (m, n), in the order of ``torch.fft.fft2``.

    Args:
        cutoff: frequency radius D0 up to which all is removed, 1 = the highest frequency along one axis.
    """
    rows, columns = 2 * torch.fft.fftfreq(m)[:, None], 2 * torch.fft.fftfreq(n)
    return torch.hypot(rows, columns) > cutoff


def released_filter(m: int, n: int, cutoff: float) -> Tensor:
    """The released code's filter: indices within ``cutoff * min(m, n)`` of the centre of the *unshifted* spectrum.

    It removes a corner region around zero frequency whose size depends on the shape: 0.02 % of a square matrix, 68 % of
    a 4:1 one.
    """
    rows, columns = torch.arange(m)[:, None] - m // 2, torch.arange(n) - n // 2
    return torch.hypot(rows.float(), columns.float()) <= cutoff * min(m, n)


def high_pass(matrices: Tensor, kept: Tensor) -> Tensor:
    """The real part of each matrix without the frequencies that are not kept.

    Args:
        matrices: (..., m, n).
        kept: (m, n) boolean.
    """
    return torch.fft.ifft2(torch.fft.fft2(matrices) * kept.to(matrices.device)).real


def top_of_rows(matrix: Tensor, fraction: float) -> Tensor:
    """The entries of largest size of each row, at least one; zero elsewhere."""
    count = max(1, int(fraction * matrix.shape[-1] + 1e-9))
    index = matrix.abs().topk(count, dim=-1).indices
    return torch.zeros_like(matrix).scatter(-1, index, matrix.gather(-1, index))


def compensation(sparse: Tensor, filtered: Tensor, fraction: float) -> float:
    """``mu = -log10(d) E|kept entries of tau| / E|v|`` with ``v`` the filtered task vector; 0 where either is zero."""
    kept, rest = sparse[sparse != 0].abs(), filtered.abs().mean()
    if len(kept) == 0 or rest == 0:
        return 0.0
    return float(-math.log10(fraction) * kept.mean() / rest)
