"""Single files that appear whole or stay as they were, and what tells them from others."""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import DiDiError

#: Under this key, among versions, a manifest says that this package wrote it.
MARK = "fusion-bench-didi"
#: What the system says where a disk, a quota or the size of a file is at its end.
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def from_home(place: str | Path) -> Path:
    """A place whose ``~`` or ``~user`` stands for a home directory.

    Raises:
        DiDiError: for that of a user whom the system does not know, and for what is no place, as a model in memory.
    """
    try:
        return Path(place).expanduser()
    except TypeError as error:
        raise DiDiError(
            f"A directory or the name of a repository is expected, and {type(place).__name__} is given."
        ) from error
    except RuntimeError as error:
        raise DiDiError(
            f"{place} begins with the home directory of a user whom this system does not know. Write the whole path."
        ) from error


def as_text(place: str | Path) -> str:
    """A place as text for what loads models, which knows no ``~``; all other text, names of the hub too, stays as it is."""
    return str(from_home(place) if str(place).startswith("~") else place)


def is_marked(manifest: Mapping[str, Any]) -> bool:
    """Whether the content of a JSON file says that this package wrote it."""
    by = manifest.get("versions")
    return type(manifest.get("format")) is int and isinstance(by, dict) and MARK in by


def no_room(error: BaseException) -> bool:
    """Whether it says that nothing more can be written."""
    if isinstance(error, SafetensorError):  # what the system says is in its text
        told = re.search(r"\(os error (\d+)\)", str(error))
        return told is not None and int(told[1]) in _NO_ROOM
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def is_regular(path: Path) -> bool:
    """Whether a file lies there, and neither a link nor what gives no end."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def write_whole(file: Path, content: str | bytes) -> None:
    """Write beside the file, to the disk, and rename."""
    beside = file.with_name(f"{file.name}.tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(beside)
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have the system write what it holds of a file or directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the system cannot
            raise
    finally:
        os.close(fd)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
