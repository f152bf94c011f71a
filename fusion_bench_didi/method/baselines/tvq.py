"""Task vector quantization, alone and around a common base ("Task Vector Quantization", ICCV 2025, arXiv 2503.06921)."""

from typing import Any, Literal

import torch
from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.entries import UniformDelta
from ...deltas.sink import EncodedTensor
from ...task_vectors.tensor import ChangedTensor
from .compression import Compressed, DeltaCompression, Others

#: Bits of an entry.
Width = Literal[1, 2, 3, 4, 8]


@auto_register_config
class TaskVectorQuantization(DeltaCompression):
    """Task vectors in a few bits per entry (TVQ), or what they have beyond a mean that has bits of its own (RTVQ).

    ``W_t = W_0 + Q_b(tau_t)``, or ``W_t = W_0 + Q_B(mean tau) + Q_b(tau_t - Q_B(mean tau))``: the offsets are taken from the base as
    it is stored. ``Q`` is per tensor, ``(q - z) s`` with ``s = (max - min) / (2^b - 1)``, ``z = -round(min / s)`` and
    ``q = round(x / s) + z`` in ``[0, 2^b - 1]``, so that zero stays zero.

    Reconstruction from a reading note of the paper. There it feeds other merging methods; here the task is given and each
    task gets its own vector back.
    """

    def __init__(
        self,
        width: Width = 3,
        base_width: Width | None = None,
        tensors: Compressed = "all",
        others: Others = "checkpoint",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    @property
    def title(self) -> str:
        if self.base_width is None:
            return f"TVQ, {self.width} bits"
        return f"RTVQ, {self.base_width} + {self.width} bits"

    def delta(self, name: str, task: str, tau: Tensor) -> UniformDelta:
        return around_zero(tau, self.width)

    def encode(self, tensor: ChangedTensor) -> EncodedTensor | None:
        compressed = self.compresses(tensor.name, tensor.shape)
        if self.base_width is None or not compressed:
            return super().encode(tensor)
        vectors = tensor.stacked()
        base = around_zero(vectors.mean(0), self.base_width)
        rest = vectors - base.own().to(vectors.device)
        offsets = [around_zero(offset, self.width) for offset in rest]
        return EncodedTensor(tensor.name, base, offsets)


def around_zero(value: Tensor, width: int) -> UniformDelta:
    """A tensor in codes of so many bits, between ends that are whole numbers of steps from zero."""
    low, high = torch.aminmax(value)
    top = 2**width - 1
    step = (high - low) / top
    if step == 0:  # all entries are alike
        return UniformDelta.of(
            torch.zeros_like(value, dtype=torch.int16), torch.stack([low, high]), width
        )
    zero = -(low / step).round()
    codes = ((value / step).round() + zero).clamp(0, top)
    ends = torch.stack([-zero * step, (top - zero) * step])
    return UniformDelta.of(codes.to(torch.int16), ends, width)
