"""Who writes where: locks that end with the process that holds them, however it ends, and what dead processes left.

A lock is a file that is locked (``flock``) and goes with its owner. Libraries for it leave the file for ever, beside every
model that was ever saved.
"""

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Scratch of a merge, in the directory for temporary files.
SCRATCH = "fusion_bench_didi-"
_SCRATCH_NAME = re.compile(rf"{SCRATCH}[a-z0-9_]{{8}}(\.lock)?")
#: What such scratch holds; nothing else is removed.
_SCRATCH_FILE = re.compile(r"\d+\.safetensors")
#: Scratch of releases without locks is left alone for so long.
_UNLOCKED_SECONDS = 24 * 3600


class Lock:
    """A file lock that ends with its process.

    Args:
        path: made if it does not exist.

    Raises:
        BlockingIOError: if someone else holds it.
        OSError: where there are no locks.
    """

    def __init__(self, path: Path):
        self._path = path
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_named():
                    return
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)  # its last owner has just removed it

    def release(self) -> None:
        """Remove the file, and let go of it."""
        _unlink(self._path)
        os.close(self._fd)

    def _is_named(self) -> bool:
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._fd))


def _unlink(path: Path) -> None:
    """Remove the file of a lock, which is empty: what holds something is someone else's."""
    with suppress(OSError):  # it, or its directory, is gone
        if not os.lstat(path).st_size:
            os.unlink(path)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold a lock while the block runs; False where the file system has none.

    Raises:
        BlockingIOError: if someone else holds it.
    """
    try:
        lock = Lock(path)
    except (BlockingIOError, PermissionError, FileNotFoundError):
        raise
    except OSError:
        _unlink(path)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether someone holds a lock, which is not touched."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


class Scratch:
    """A directory for temporary files (``TMPDIR`` says where) that goes with this object, with the process, or with the next
    process that wants one.

    Attributes:
        path: of the directory.
    """

    def __init__(self):
        root = Path(tempfile.gettempdir())
        sweep_scratch(root)
        while True:
            fd, name = tempfile.mkstemp(prefix=SCRATCH, suffix=".lock", dir=root)
            os.close(fd)
            try:
                lock: Lock | None = Lock(Path(name))
            except BlockingIOError:  # a sweeper was faster
                continue
            except OSError:
                lock = None
                os.unlink(name)
            break
        self.path = Path(name).with_suffix("")
        self.path.mkdir(mode=0o700)
        self._removed = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        self._removed()


def _remove(path: Path, lock: Lock | None, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked process ends, its parent goes on
    shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        lock.release()


def sweep_scratch(root: Path) -> None:
    """Remove the scratch of this user's dead processes."""
    for path in root.glob(f"{SCRATCH}*"):
        with suppress(OSError):
            found = path.lstat()
            if not _SCRATCH_NAME.fullmatch(path.name) or found.st_uid != os.getuid():
                continue
            if stat.S_ISREG(found.st_mode) and not found.st_size:
                with held(path) as sure:
                    if sure:
                        _remove_scratch(path.with_suffix(""))
            elif stat.S_ISDIR(found.st_mode) and not path.suffix:
                idle = time.time() - found.st_mtime
                lock = path.with_name(f"{path.name}.lock")
                if idle > _UNLOCKED_SECONDS and not lock.exists():
                    _remove_scratch(path)


def _remove_scratch(directory: Path) -> None:
    """Remove a directory that holds nothing but scratch."""
    files = list(directory.iterdir())
    if all(_SCRATCH_FILE.fullmatch(file.name) for file in files):
        shutil.rmtree(directory)
