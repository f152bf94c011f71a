"""FREE-Merging (Zheng & Wang, "Fourier Transform for Efficient Model Merging", ICCV 2025, arXiv 2411.16815)."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.masks import SparseDelta
from ...deltas.plain import DenseDelta
from ...deltas.sink import EncodedTensor
from ...errors import ModelPoolError, SettingsError
from ...options import Part, Patterns, Positive, Scale, as_patterns, refuse_idle
from ...task_vectors.alignment import matches
from ...task_vectors.loop import Progress
from ...task_vectors.reader import TaskVectors
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod

log = logging.getLogger(__name__)

#: values of keys that are left open, by filter
PUBLISHED = {
    "paper": {"cutoff": 0.1, "shared_scale": 1.0, "expert_scale": 1.0},
    "code": {"cutoff": 0.7, "shared_scale": 0.25, "expert_scale": 0.5},
}

#: The highest frequency of both axes, as a radius.
_FARTHEST = 2**0.5


@auto_register_config
class FreeMerging(DynamicMethod):
    """A backbone of high-pass filtered task vectors, and per task a sparse rescaled expert; the task is given.

    For attention and MLP weights: ``v_t = highpass(tau_t)``, ``S = s sum_t c_t v_t``, and the expert
    ``e_t = s_e mu_t TopK_d(tau_t)`` of each row's largest ``d`` = 1 %. Where the expert is non-zero it replaces S. All else
    stays at W_0. The paper's formulas and the released code differ in more than their filters:

    ``filter=paper`` (default): an ideal high-pass on the frequency radius, ``c_t = E|v_t| / sum_j E|v_j|``, and a factor **per
    tensor**, ``mu_t = -log10(d) E|kept entries of tau_t| / E|v_t|``. Whether E runs over a tensor or over a model, the
    formulas leave open.

    ``filter=code``: Zhengsh123/FREE-Merging at 36c0f41, for ViT. The band filter of :func:`released_filter`; ``c_t = 1``;
    ``s = .25`` and ``s_e = .5``, as one scale of .5 is applied twice; ``int(d n)`` kept entries per row, none where rows are
    shorter than 1 / d; and **one** factor per task for the whole model,
    ``mu_t = -log10(d) / d mean_l E|TopK_d(tau_t^l)| / mean_l E|v_t^l|``, the means over all tensors l, filtered or not, and over
    all of a tensor's entries, zeros included.

    They score differently: on real8 ``code`` gives 49.7 % on average, ``paper`` 52.4 %. The default treats all shapes
    alike; the released filter removes 0.02 % of the frequencies of a square matrix but 68 % of a 4:1 one, so that its
    result depends on whether Q, K and V are stored in one tensor or in three.

    Inferred for ``paper``: the cutoff (.1 of the highest frequency), and ``mu_t`` without its division by ``c_t``, which the
    code cancels. Biases of these layers are averaged; the code takes those of the first task of its list, with sparse
    experts (``biases=released``, first by name). Left out: the router (a ResNet-18 whose weights are not released).
    """

    title = "FREE-Merging"

    def __init__(
        self,
        filter: Literal["paper", "code"] = "paper",
        cutoff: Positive | None = None,
        shared_scale: Scale | None = None,
        keep: Part = 0.01,
        expert_scale: Scale | None = None,
        patterns: Patterns = ("*attn*", "*mlp*"),
        biases: Literal["mean", "pretrained", "released"] = "mean",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if biases == "released" and filter != "code":
            raise SettingsError(
                "biases='released' is of filter=code: the paper has no factor for a whole model."
            )
        if self.filter == "paper" and self._value("cutoff") > _FARTHEST:
            raise SettingsError(
                f"cutoff={self.cutoff} removes every frequency, so that nothing is merged: with filter=paper the farthest is at 1.41."
            )
        if self._value("expert_scale") == 0:
            refuse_idle(self, {"keep": "of the experts, and expert_scale=0"})

    def prepare(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> None:
        patterns = list(as_patterns(self.patterns))
        if not any(map(self._filtered, names)):
            raise ModelPoolError(
                f"No changed tensor matches patterns={patterns}; there are {list(names[:4])} ... "
                "Name the attention and MLP tensors of this architecture."
            )
        if self.filter == "code":
            self._factors = self._released_factors(task_vectors, names, progress)

    def encode(self, tensor: ChangedTensor) -> EncodedTensor | None:
        if not self._filtered(tensor.name):
            return None
        vectors, dtype = tensor.stacked(), tensor.dtype
        if not self._is_weight(tensor):
            return self._encode_bias(tensor, vectors)
        filtered = self._high_passed(tensor, vectors)
        if self.filter == "code":
            kept = [released_top(tau, self.keep) for tau in vectors]
            factors = self._factors
        else:
            kept = [
                top_of_rows(tau.view(tensor.sides), self.keep).view(tensor.shape)
                for tau in vectors
            ]
            pairs = zip(kept, filtered)
            factors = [compensation(sparse, v, self.keep) for sparse, v in pairs]
        shared = self._merged(filtered).view(tensor.shape)
        return EncodedTensor(
            tensor.name,
            DenseDelta.of(tensor.shape, shared, dtype),
            self._experts(kept, factors, dtype),
        )

    def _encode_bias(
        self, tensor: ChangedTensor, vectors: Tensor
    ) -> EncodedTensor | None:
        """Encode a tensor that is neither filtered nor left alone."""
        if self.biases == "pretrained":
            return None
        dtype, experts = tensor.dtype, [None] * len(vectors)
        if self.biases == "mean":
            shared = vectors.mean(0)
        else:
            shared = self._value("shared_scale") * vectors[0]
            kept = [released_top(tau, self.keep) for tau in vectors]
            experts = self._experts(kept, self._factors, dtype)
        return EncodedTensor(
            tensor.name, DenseDelta.of(tensor.shape, shared, dtype), experts
        )

    def _experts(
        self, kept: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype
    ) -> list[SparseDelta]:
        scale = self._value("expert_scale")
        return [
            SparseDelta.of((scale * factor * sparse).cpu(), dtype)
            for sparse, factor in zip(kept, factors)
        ]

    def _released_factors(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> list[float]:
        """``mu_t`` of the released code, one per task; 0 for a task that equals the base model."""
        device = self.fabric.device

        def sizes(name: str) -> Tensor:
            tensor = task_vectors.tensor(name, device)
            vectors = tensor.stacked()
            kept = torch.stack([released_top(tau, self.keep) for tau in vectors])
            if self._filtered(name) and self._is_weight(tensor):
                vectors = self._high_passed(tensor, vectors)
            rows = torch.stack([t.reshape(len(t), -1) for t in (kept, vectors)])
            return rows.abs().mean(2, dtype=torch.float64).cpu()  # (2, T)

        found = self.each(task_vectors, "rescaling", sizes, names, progress=progress)
        # tensors that no task changed would count in both means, and cancel
        experts, rest = sum(size for _, size in found)  # (T,) each
        if not experts.any():
            log.warning(
                "keep=%g keeps no entry of rows this short, so that there are no experts; filter=code rounds down.",
                self.keep,
            )
        ratio = torch.where(rest > 0, experts / rest, 0.0)
        return (-math.log10(self.keep) / self.keep * ratio).tolist()

    def _filtered(self, name: str) -> bool:
        """Whether a tensor takes part."""
        return matches(name, as_patterns(self.patterns))

    def _is_weight(self, tensor: ChangedTensor) -> bool:
        """Whether a tensor has a spectrum; the released code knows that of matrices only."""
        return min(tensor.sides) >= 2 and (
            self.filter == "paper" or len(tensor.shape) == 2
        )

    def _value(self, key: str) -> float:
        given = getattr(self, key)
        return PUBLISHED[self.filter][key] if given is None else given

    def _high_passed(self, tensor: ChangedTensor, vectors: Tensor) -> Tensor:
        """High-passed task vectors ``v_t``, (T, m, n)."""
        passing: Callable = ideal_filter if self.filter == "paper" else released_filter
        gains = passing(*tensor.sides, self._value("cutoff"))
        return high_pass(vectors.view(len(vectors), *tensor.sides), gains)

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
        cutoff: frequency radius D0 below which all is removed, 1 = the highest frequency along one axis.
    """
    rows, columns = 2 * torch.fft.fftfreq(m)[:, None], 2 * torch.fft.fftfreq(n)
    return torch.hypot(rows, columns) >= cutoff


def released_filter(m: int, n: int, cutoff: float) -> Tensor:
    """The released code's filter: the gain of each frequency, (m, n), in the order of ``torch.fft.fft2``.

    1 for indices within ``cutoff * min(m, n)`` of the middle of the *unshifted* spectrum, else 0. It is made of a disk up to
    ``min(m, n) // 10`` and a band from there on, both with their edges, so that frequencies at exactly that distance
    have gain 2. It removes a corner region around zero frequency whose size depends on the shape: 0.02 % of a square
    matrix, 68 % of a 4:1 one.
    """
    rows, columns = torch.arange(m)[:, None] - m // 2, torch.arange(n) - n // 2
    squared = rows.square() + columns.square()
    inner = min(m, n) // 10
    disk = squared <= inner**2
    band = (squared >= inner**2) & (squared.sqrt() <= cutoff * min(m, n))
    return disk.float() + band.float()


def high_pass(matrices: Tensor, gains: Tensor) -> Tensor:
    """The real part of each matrix with every frequency multiplied by its gain.

    Args:
        matrices: (..., m, n).
        gains: (m, n), boolean for a filter that keeps or removes.
    """
    return torch.fft.ifft2(torch.fft.fft2(matrices) * gains.to(matrices.device)).real


def top_of_rows(matrix: Tensor, fraction: float) -> Tensor:
    """The entries of largest size of each row, at least one; zero elsewhere."""
    return _top(matrix, max(1, int(fraction * matrix.shape[-1] + 1e-9)))


def released_top(tensor: Tensor, fraction: float) -> Tensor:
    """As the released code keeps them: along the last dimension, ``int(size * fraction)``, which may be none; scalars whole."""
    if tensor.ndim == 0:
        return tensor
    return _top(tensor, int(tensor.shape[-1] * fraction))


def _top(tensor: Tensor, count: int) -> Tensor:
    index = tensor.abs().topk(count, dim=-1).indices
    return torch.zeros_like(tensor).scatter(-1, index, tensor.gather(-1, index))


def compensation(sparse: Tensor, filtered: Tensor, fraction: float) -> float:
    """``mu = -log10(d) E|kept entries of tau| / E|v|`` with ``v`` the filtered task vector; 0 where either is zero."""
    kept, rest = sparse[sparse != 0].abs(), filtered.abs().mean()
    if len(kept) == 0 or rest == 0:
        return 0.0
    return float(-math.log10(fraction) * kept.mean() / rest)
