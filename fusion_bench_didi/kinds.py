"""Every stored form by the name that files know it by."""

from . import deltas, quantised
from .deltas import Delta

KINDS: dict[str, type[Delta]] = {
    cls.kind: cls
    for module in (deltas, quantised)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Delta) and cls is not Delta
}
