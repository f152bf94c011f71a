"""Renames that replace nothing, or exchange two directories in one step, where the system has them (Linux)."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_CWD = -100
_NO_REPLACE, _EXCHANGE = 1, 2
#: what a system, or a file system, answers that does not know these renames
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def rename_new(source: Path, target: Path) -> None:
    """Rename, unless the target exists.

    Raises:
        FileExistsError: if it does, were it an empty directory.
    """
    if _renamed(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(one: Path, other: Path) -> None:
    """Let two directories take each other's name.

    Where the system cannot do it in one step, ``other`` is called ``one`` with the ending ``.old`` for a moment.
    """
    if _renamed(one, other, _EXCHANGE):
        return
    old = one.with_suffix(".old")
    os.rename(other, old)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(old, other)
        raise
    os.rename(old, one)


def _renamed(source: Path, target: Path, flags: int) -> bool:
    """Call ``renameat2``; returns False where the system does not have it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    sys.audit("os.rename", str(source), str(target), -1, -1)
    paths = os.fsencode(source), os.fsencode(target)
    if call(_AT_CWD, paths[0], _AT_CWD, paths[1], ctypes.c_uint(flags)) == 0:
        return True
    fault = ctypes.get_errno()
    if fault in _UNKNOWN:
        return False
    raise OSError(fault, os.strerror(fault), str(source), None, str(target))
