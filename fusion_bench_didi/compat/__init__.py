"""Other versions of the host and of this package; cheap, since every start of Hydra imports it.

The program instantiates the model pool before the method, so importing this package from the method would be too late for
``modelpool=OpenCLIPVisionModelPool/...``. Hence :func:`apply` runs when ``fusion_bench_didi`` is imported, and the Hydra
search-path plugin imports that. No torch here.
"""

from . import host, old_names
from .lazy import lazy
from .old_names import renamed

__all__ = ["apply", "lazy", "renamed"]


def apply() -> None:
    """Make the host's modules importable, and ours by their old names. Safe to call any number of times."""
    host.mend()
    old_names.find()
