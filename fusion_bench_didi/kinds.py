"""Every stored form by the name that files know it by."""

from . import common_deltas, deltas, quantised
from .deltas import Delta

KINDS: dict[str, type[Delta]] = {
    cls.kind: cls
    for module in (deltas, quantised, common_deltas)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Delta) and hasattr(cls, "kind")
}
