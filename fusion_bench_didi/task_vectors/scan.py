"""Aligned, lazy, checked reading of a base model and its T fine-tuned models, one tensor at a time.

A *source* (``sources.py``) gives tensors by the names of the base model's parameters. ``TaskVectors`` lines T sources up with the base,
finds every fault from shapes and dtypes alone, and sorts the tensors into classes (adapters, ``adapters.py``, are sources
of what they change, as factors where they can):

- ``matrices``: two sides of at least 2 (a convolution is viewed as out x (in * kh * kw));
- ``vectors``: everything else that some task changed (biases, norms, class embeddings);
- ``untouched``: what no task changed; costs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scan:
    """What one read of every tensor tells.

    Args:
        energy: per tensor, (T,) squared norms of the task vectors.
        changed: names that at least one task changed.
    """

    energy: Mapping[str, Tensor]

    @property
    def changed(self) -> list[str]:
        return [name for name, e in self.energy.items() if bool((e > 0).any())]
