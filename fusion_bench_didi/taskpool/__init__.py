"""Task pools that tell a dynamic model its task, and the attachment that makes stock pools do so.

Pools are imported on first use: each needs the libraries of its own family.
"""

from typing import TYPE_CHECKING

from ..compat import lazy
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

__all__ = ["attach", *_POOLS]
__getattr__ = lazy(__name__, _POOLS)
