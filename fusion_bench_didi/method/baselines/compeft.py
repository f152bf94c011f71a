"""ComPEFT (Yadav et al., arXiv 2311.13171): sparse ternary task vectors."""

from collections.abc import Sequence
from typing import Any

import torch
from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.entries import ScatteredDelta, signs
from ...options import Positive, Share
from ...task_vectors.loop import Progress
from ...task_vectors.reader import TaskVectors
from .compression import Compressed, DeltaCompression, Others
from .tall_mask import trim_threshold


@auto_register_config
class ComPEFT(DeltaCompression):
    """The largest entries of a whole task vector, as signs times one scale.

    ``W_t = W_0 + a s_t 1[|tau_t| >= q_t] sign(tau_t)`` where ``q_t`` leaves a share ``density`` of all entries, and ``s_t`` is the
    standard deviation of the entries of ``tau_t``, both over all tensors. Positions take their entropy, signs a bit.

    Reconstruction from the paper's description (it is about LoRA adapters and (IA)^3): there Golomb codes hold the
    positions, and ``a`` is searched on validation data in .5 to 10 with densities of .05 to .5. Nothing is searched here;
    ``alpha`` and ``density`` are settings. Entries that are compared are those of the tensors that are compressed.
    """

    title = "ComPEFT"

    def __init__(
        self,
        density: Share = 0.1,
        alpha: Positive = 2.0,
        tensors: Compressed = "all",
        others: Others = "checkpoint",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)

    def prepare(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> None:
        super().prepare(task_vectors, names, progress)
        self._cut: dict[str, tuple[float, float]] = {}
        names = list(self.compressed(task_vectors, names))
        for i, task in enumerate(task_vectors.tasks if names else ()):
            found = [self.read(task_vectors, name, i).flatten() for name in names]
            entries = torch.cat(found)
            limit = trim_threshold(entries.abs(), self.density)
            self._cut[task] = limit, float(entries.std(correction=0))
            progress("trimming", i, len(task_vectors.tasks))

    def delta(self, name: str, task: str, tau: Tensor) -> ScatteredDelta | None:
        limit, deviation = self._cut[task]
        kept = (tau.abs() >= limit) & (tau != 0)
        if not kept.any():
            return None
        return ScatteredDelta.of(kept, *signs(tau[kept], self.alpha * deviation), 1)
