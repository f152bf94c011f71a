"""Twin-Merging (Lu et al., NeurIPS 2024, arXiv 2406.15479)."""

from typing import Any, Literal

from fusion_bench import auto_register_config

from ...deltas.plain import DenseDelta
from ...deltas.sink import EncodedTensor
from ...options import Fraction, Scale
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod
from .singular import rank_of, truncated


@auto_register_config
class TwinMerging(DynamicMethod):
    """A static merge that all tasks share, and per task the low-rank remainder; the task is given (oracle routing).

    ``theta* = theta_0 + s sum_t tau_t`` and ``W_t = theta* + SVD_r(theta_t - theta*)`` with ``r = int((1 - .9) min(m, n))``
    for matrices, in floating point as in the released code: one less than a tenth where the side is a multiple of ten; everything else is the task's own. Stored are ``s sum_t tau_t`` and the remainders, beside ``theta_0``:
    x_incl = 2 + experts.

    Source: the released code, which is for RoBERTa and Qwen: ``s`` is .29 there, biases and classifier stay out of
    both steps, vectors are not truncated.

    Inferred: ``s`` = .3, the value of task arithmetic for CLIP; 4-D convolutions viewed as matrices. Left out: the
    learned router (a trained MLP on task data) and the code's other truncations (by magnitude, at random).
    """

    title = "Twin-Merging"

    def __init__(
        self,
        scale: Scale = 0.3,
        rank_fraction: Fraction = 0.1,
        conv: Literal["matrix", "dense"] = "matrix",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    def encode(self, tensor: ChangedTensor) -> EncodedTensor:
        vectors, shape, dtype = tensor.stacked(), tensor.shape, tensor.dtype
        low_rank = len(shape) == 2 or self.conv == "matrix"
        if not low_rank or min(tensor.sides) < 2:
            own = [DenseDelta.of(shape, tau, dtype) for tau in vectors]
            return EncodedTensor(tensor.name, None, own)
        merged = self.scale * vectors.sum(0)
        mask_rate = 1 - self.rank_fraction
        rank = rank_of(shape, 1 - mask_rate)
        return EncodedTensor(
            tensor.name,
            DenseDelta.of(shape, merged, dtype),
            [
                truncated(tau - merged, rank, dtype=dtype, name=tensor.name)
                for tau in vectors
            ],
        )
