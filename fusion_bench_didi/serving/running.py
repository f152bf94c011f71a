"""The batch that a thread is running, handed to the layers past the backbone's own signatures.

Every thread sees its own, so that threads may serve one model at the same time. A layer may be given several rows per sample,
as beams and windows of images are.
"""

import threading
from typing import Any

from torch import Tensor

from .mixtures import Mix


class Pass:
    """One run of a network.

    Args:
        mix: what the batch is mixed by.

    Attributes:
        fused: what fused layers have worked out and was not asked for yet, by their number.
        weight: of the norm that is run, per sample.
    """

    def __init__(self, mix: Mix):
        self.mix = mix
        self._repeated: dict[int, Mix] = {}
        self.fused: dict[int, tuple[Any, list]] = {}
        self.weight: Tensor | None = None

    def mix_of(self, rows: int) -> Mix | None:
        """The mix of so many rows, all rows of a sample side by side; None where they are no multiple of the samples."""
        if rows == self.mix.size:
            return self.mix
        times, rest = divmod(rows, self.mix.size)
        if rest or not times:
            return None
        if times not in self._repeated:
            self._repeated[times] = self.mix.repeated(times)
        return self._repeated[times]


class Running(threading.local):
    """The pass that each thread is in."""

    def __init__(self):
        # per thread; as a class attribute it would make torch.compile start anew once it is set
        self.current: Pass | None = None
