"""Task pools that tell a dynamic model its task, and the attachment that makes stock pools do so.

Pools are imported on first use: each needs the libraries of its own family.
"""

from typing import TYPE_CHECKING

from .task_switching import attach

if TYPE_CHECKING:
    from .clip_vision import TaskAwareCLIPVisionModelTaskPool
    from .mixed_stream import MixedStreamCLIPVisionModelTaskPool
    from .openclip_vision import TaskAwareOpenCLIPVisionModelTaskPool
    from .text import PerplexityTaskPool, TextClassificationTaskPool

_POOLS = {
    "TaskAwareCLIPVisionModelTaskPool": "clip_vision",
    "MixedStreamCLIPVisionModelTaskPool": "mixed_stream",
    "PerplexityTaskPool": "text",
    "TaskAwareOpenCLIPVisionModelTaskPool": "openclip_vision",
    "TextClassificationTaskPool": "text",
}


def __getattr__(name: str):
    from importlib import import_module

    if name in _POOLS:
        return getattr(import_module(f".{_POOLS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["attach", *_POOLS]
