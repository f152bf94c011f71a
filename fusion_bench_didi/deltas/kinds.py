"""Every stored form by the name that files know it by."""

from . import masks, plain, quantized, tucker
from .base import Delta

KINDS: dict[str, type[Delta]] = {
    cls.kind: cls
    for module in (plain, masks, quantized, tucker)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Delta) and hasattr(cls, "kind")
}
