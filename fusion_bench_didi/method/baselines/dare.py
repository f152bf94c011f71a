"""DARE (Yu et al., "Language Models are Super Mario", ICML 2024, arXiv 2311.03099) as a way to store task vectors."""

from typing import Any, Literal

import torch
from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.entries import ScatteredDelta, SeededDelta, between_ends, drawn
from ...options import Count, Positive, refuse_idle
from ...quantization.counters import seed_of
from .compression import Compressed, DeltaCompression, Dropped, Others


@auto_register_config
class DARE(DeltaCompression):
    """Entries dropped at random, the others raised by as much.

    ``W_t = W_0 + g / (1 - p) m_t * tau_t`` with ``m_t`` one with probability ``1 - p``, independently for every entry, and a
    gain ``g`` of 1, so that the expected change is the task vector. Values take 16 bits (bfloat16), or codes of a few bits
    between the smallest and the largest that is kept.

    Source: the paper and its released code, which drops and rescales every parameter. The paper stores nothing; counts in
    the literature (23.7 times smaller than 16 bits at p = .97) are of values in 16 bits at entropy-coded positions, which is
    ``positions=stored``. Of our own: ``positions=seed``, for random positions need not be stored where the reader can draw
    them again (``deltas/entries.py``; the seed lies in the manifest), few-bit values, and other gains than 1.
    """

    def __init__(
        self,
        drop: Dropped = 0.9,
        width: Literal[1, 2, 3, 4, 8, 16] = 16,
        positions: Literal["seed", "stored"] = "seed",
        gain: Positive = 1.0,
        seed: Count = 0,
        tensors: Compressed = "all",
        others: Others = "checkpoint",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not self.drop:
            refuse_idle(self, {"seed": "of the entries that are dropped, and drop=0"})

    @property
    def title(self) -> str:
        return f"DARE, {self.width} bits"

    def delta(
        self, name: str, task: str, tau: Tensor
    ) -> ScatteredDelta | SeededDelta | None:
        seed, keep = seed_of(self.seed, task, name), round((1 - self.drop) * 2**32)
        kept = drawn(seed, keep, tau.numel(), tau.device).view(tau.shape)
        if not kept.any():
            return None
        values, ends = tau[kept] * (self.gain / (1 - self.drop)), None
        if self.width < 16:
            values, ends = between_ends(values, self.width)
        else:
            values = values.to(torch.bfloat16)
        if self.positions == "stored":
            return ScatteredDelta.of(kept, values, ends, self.width)
        shape = tuple(tau.shape)
        return SeededDelta.of(shape, values, ends, self.width, seed=seed, keep=keep)
