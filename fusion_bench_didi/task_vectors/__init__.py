"""Task vectors, read one tensor at a time: sources (files, modules, LoRA adapters) aligned with the base model and scanned once."""

from ..compat import lazy

__getattr__ = lazy(
    __name__,
    {
        "TaskVectors": "reader",
    },
)
