"""UltraDelta ("Breaking the Compression Ceiling", NeurIPS 2025, arXiv 2505.13563)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from fusion_bench import auto_register_config
from torch import Tensor

from ...deltas.entries import ScatteredDelta, between_ends
from ...errors import SettingsError
from ...lowrank.svd import singular_values
from ...options import Count, Positive, refuse_idle
from ...quantization.counters import random_words, seed_of
from ...task_vectors.loop import Progress
from ...task_vectors.reader import TaskVectors
from .compression import Compressed, DeltaCompression, Dropped, Others

#: No layer is pruned by more, as in the released code.
_MOST = 0.99


@auto_register_config
class UltraDelta(DeltaCompression):
    """Few-bit codes of which most are dropped at random, evenly from every code and less in layers of large variance.

    1. Entries of a matrix become codes of b bits between its ends.
    2. Layers in order of their codes' standard deviation: the lower third of all parameters is pruned at ``s + step``, the
       middle one at ``s``, the rest so that the mean is ``s``.
    3. Of each code of a matrix ``round(n s)`` entries are dropped at random.
    4. What is left is multiplied by ``g / (1 - s)``, and by the smallest trace norm among the tasks over the task's own, so that
       of two pruned vectors the noisier one shrinks.

    Source: the released code, written anew; ``g`` is its ``additional_factor``. It keeps results in memory only: positions take
    their entropy here, codes b bits, which is how the paper counts (50.9 times smaller than 16 bits at s = .97, 132.5 at
    .99). It takes weights of attention and MLP; everything else stays the base model's.
    """

    title = "UltraDelta"

    def __init__(
        self,
        drop: Dropped = 0.97,
        step: Dropped = 0.01,
        width: Literal[1, 2, 3, 4, 8] = 4,
        gain: Positive = 1.0,
        trace_norm: bool = True,
        seed: Count = 0,
        tensors: Compressed = "linear",
        others: Others = "pretrained",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if self.drop + self.step > 1:
            raise SettingsError(
                f"drop + step = {self.drop + self.step} is a share of entries; choose at most 1."
            )
        if not self.drop + self.step:
            of = "of the entries that are dropped, and drop + step = 0"
            refuse_idle(self, {"seed": of})
        self._rates: dict[str, dict[str, float]] = {}
        self._gains: dict[str, float] = {}

    def prepare(
        self, task_vectors: TaskVectors, names: Sequence[str], progress: Progress
    ) -> None:
        super().prepare(task_vectors, names, progress)
        tasks, norms = task_vectors.tasks, {}
        sizes = self.compressed(task_vectors, names)
        for i, task in enumerate(tasks):
            read = partial(self.read, task_vectors, task=i)
            spread = {n: float(self._coded(read(n)).std(correction=0)) for n in sizes}
            self._rates[task] = pruning_rates(spread, sizes, self.drop, self.step)
            self._gains[task] = 1.0
            if self.trace_norm:
                kept = [self.delta(name, task, read(name)) for name in sizes]
                norms[task] = sum(_trace_norm(delta) for delta in kept if delta)
            progress("pruning", i, len(tasks))
        least = min((norm for norm in norms.values() if norm > 0), default=0.0)
        for task, norm in norms.items():
            self._gains[task] = least / norm if norm > 0 else 1.0

    def delta(self, name: str, task: str, tau: Tensor) -> ScatteredDelta | None:
        codes, ends = between_ends(tau, self.width)
        words = random_words(seed_of(self.seed, task, name), tau.numel(), tau.device)
        kept = evenly_kept(codes, self._rates[task][name], words.view(tau.shape))
        if not kept.any():
            return None
        factor = self.gain * self._gains[task] / (1 - self.drop)
        return ScatteredDelta.of(kept, codes[kept], ends * factor, self.width)

    def _coded(self, tau: Tensor) -> Tensor:
        codes, (low, high) = between_ends(tau, self.width)
        return low + codes * ((high - low) / (2**self.width - 1))


def pruning_rates(
    spread: Mapping[str, float], sizes: Mapping[str, int], drop: float, step: float
) -> dict[str, float]:
    """Share of the entries of each layer that is dropped: ``drop`` on average, and less where entries vary more.

    Args:
        spread: standard deviation of the entries of a layer.
        sizes: number of its entries.
        step: what the third of least spread is pruned by beyond ``drop``.
    """
    total, passed, rates = sum(sizes.values()), 0, {}
    for name in sorted(spread, key=lambda name: (spread[name], name)):
        passed += sizes[name]
        if 3 * passed <= total:
            rates[name] = drop + step
        elif 3 * passed <= 2 * total:
            rates[name] = drop
    last = total - sum(sizes[name] for name in rates)
    used = sum(rates[name] * sizes[name] for name in rates)
    rest = min(max((drop * total - used) / max(last, 1), 0.0), _MOST)
    return {name: rates.get(name, rest) for name in spread}


def evenly_kept(codes: Tensor, drop: float, words: Tensor) -> Tensor:
    """Where an entry is kept if of each code ``round(drop n)`` of n entries are dropped; boolean, of the codes' shape.

    Args:
        words: random, of the codes' shape, in ``[0, 2^32)``; entries with the smallest are dropped.
    """
    flat = codes.flatten().long()
    order = ((flat << 32) + words.flatten()).argsort()
    counts = torch.bincount(flat)
    place = torch.arange(len(flat), device=flat.device)
    place -= (counts.cumsum(0) - counts)[flat[order]]
    dropped = (counts.double() * drop).round()[flat[order]]
    kept = torch.empty_like(flat, dtype=torch.bool)
    kept[order] = place >= dropped
    return kept.view(codes.shape)


def _trace_norm(delta: ScatteredDelta) -> float:
    """Trace norm of a matrix; vectors have no say, as in the released code."""
    if len(delta.shape) < 2:
        return 0.0
    return float(singular_values(delta.own().flatten(1)).sum())
