"""Single files that appear whole or stay as they were, and what tells them from others."""

import errno
import hashlib
import os
from pathlib import Path


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
