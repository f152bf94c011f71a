"""What this package wrote: directories that say so, and what in them is not of it."""

import re
from pathlib import Path

from ..errors import CheckpointMismatchError
from .fields import read_object

CONFIG = "config.json"
#: Under this key a manifest says who wrote it.
MARK = "fusion-bench-didi"
#: Weights and directories of a saved model, and of the hub's client beside it.
_PARTS = re.compile(
    r"(model|router)[-\w]*\.safetensors|backbone|experts|modules|\.cache"
)
_WEIGHTS = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
)


def is_ours(directory: Path, file: str = CONFIG) -> bool:
    """Whether a directory says that this package wrote it.

    Args:
        file: that says so.
    """
    try:
        found = read_object(directory / file, whole=False)
    except CheckpointMismatchError:
        return False
    by = found.get("versions")
    return type(found.get("format")) is int and isinstance(by, dict) and MARK in by


def others(directory: Path) -> list[str]:
    """Names of weights and directories in a saved model's directory that are no part of it: a base model beside the merge, say."""
    found = (p for p in directory.iterdir() if p.suffix in _WEIGHTS or p.is_dir())
    return sorted(path.name for path in found if not _PARTS.fullmatch(path.name))
