"""BitDelta (Liu et al., "Your Fine-Tune May Only Be Worth One Bit", NeurIPS 2024, arXiv 2402.10193), without distillation."""

from typing import Any

from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.entries import UniformDelta, signs
from .compression import Compressed, DeltaCompression, Others


@auto_register_config
class BitDelta(DeltaCompression):
    """The signs of every task vector and one scale per matrix.

    ``W_t = W_0 + a sign(tau_t)`` with ``a = mean |tau_t|``, which has the least squared error of all scales; zero counts as
    positive. One bit per entry and 64 bits per matrix.

    Source: the paper and its released code, which compress the linear layers of attention and MLP; everything else is the
    fine-tuned model's, whole. Left out: the distillation of the scales on 800 texts, for no method here sees data.
    """

    title = "BitDelta"

    def __init__(
        self,
        tensors: Compressed = "linear",
        others: Others = "checkpoint",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    def delta(self, name: str, task: str, tau: Tensor) -> UniformDelta:
        return UniformDelta.of(*signs(tau, tau.abs().mean()), 1)
