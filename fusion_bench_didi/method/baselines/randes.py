"""RanDeS (Zhou et al., "Randomized Delta Superposition for Multi-Model Compression", arXiv 2505.11204), as the host has it."""

from typing import Any

import torch
from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.entries import drawn
from ...deltas.masks import SignedDelta
from ...deltas.plain import DenseDelta
from ...deltas.sink import EncodedTensor
from ...options import Count, Positive
from ...quantization.counters import seed_of
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod
from .compression import is_linear


@auto_register_config
class RanDeS(DynamicMethod):
    """Task vectors superposed under random signs of columns, which each task takes back.

    ``W_t = W_0 + lambda (sum_i tau_i D_i) D_t`` for weights of linear layers, with diagonal matrices ``D_i`` of random signs; to
    the task's own vector the others are added as noise rather than as what they are. Other tensors change by
    ``lambda sum_i tau_i`` for all tasks. One dense model for any number of tasks.

    Source: the host's ``SuperposedTaskArithmeticAlgorithm`` with its defaults (``random_binary_diagonal_matrix``, no shift of
    layers), which cannot be run from its configuration in 0.2.33, draws signs from the hash of a name, that is others in every
    process, and makes T whole models. Here signs are drawn from ``seed``, task and name, and stored, a bit per column.
    """

    title = "RanDeS"

    def __init__(self, scaling_factor: Positive = 0.5, seed: Count = 0, **kwargs: Any):
        super().__init__(**kwargs)

    def signs(self, task: str, name: str, columns: int) -> Tensor:
        """(columns,) -1 and 1, equally likely."""
        negative = drawn(seed_of(self.seed, task, name), 2**31, columns)
        return 1.0 - 2.0 * negative.float()

    def encode(self, tensor: ChangedTensor) -> EncodedTensor:
        name, shape, vectors = tensor.name, tensor.shape, tensor.stacked()
        experts: list[SignedDelta | None] = [None] * len(vectors)
        if is_linear(name, shape):
            signs = [self.signs(task, name, shape[-1]) for task in self.tasks]
            experts = [SignedDelta.of(shape, one) for one in signs]
            vectors = vectors * torch.stack(signs).to(vectors.device)[:, None]
        superposed = self.scaling_factor * vectors.sum(0)
        shared = DenseDelta.of(shape, superposed, tensor.dtype)
        return EncodedTensor(name, shared, experts)
