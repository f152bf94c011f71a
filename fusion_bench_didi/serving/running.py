"""The batch that a thread is running, handed to the layers past the backbone's own signatures.

Every thread sees its own, so that threads may serve one model at the same time.
"""

import threading
from typing import Any

from .mixtures import Mix


class Pass:
    """One run of a network.

    Args:
        mix: what the batch is mixed by.

    Attributes:
        fused: what fused layers have worked out and was not asked for yet, by their number.
    """

    def __init__(self, mix: Mix):
        self.mix = mix
        self.fused: dict[int, tuple[Any, list]] = {}


class Running(threading.local):
    """The pass that each thread is in."""

    def __init__(self):
        # per thread; as a class attribute it would make torch.compile start anew once it is set
        self.current: Pass | None = None
