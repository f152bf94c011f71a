"""Files that must not change while they are read."""

import hashlib
import os
import stat
from pathlib import Path

from ..errors import CheckpointMismatchError
from ..files import file_digest

#: Bytes that are read at a time of a file that is looked at, and how often.
BLOCK, BLOCKS = 2**14, 64


class Watched:
    """Files that must not change while a merge reads them: what was opened is held against what is there.

    Raises:
        CheckpointMismatchError: if a file is none, or is another one than when it was opened.
    """

    def __init__(self, label: str):
        self._label = label
        self._seen: dict[Path, tuple] = {}

    def opened(self, file: Path) -> None:
        """Note a file before it is opened."""
        self._seen[file] = self._stamp(file)

    @property
    def identity(self) -> dict[str, str]:
        """Size and dates of every file, by its path; that of the last change of any kind cannot be set back."""
        found = {}
        for file, (_, _, size, written, changed) in self._seen.items():
            place = os.path.join(os.path.realpath(file.parent), file.name)
            found[place] = f"{size} bytes of {written / 1e9:.6f}, changed {changed / 1e9:.6f}"  # fmt: skip
        return found

    @property
    def glimpses(self) -> list[str]:
        """A checksum of every file's size and of some blocks of it, wherever they lie."""
        return sorted(map(glimpse, self._seen))

    def check_all(self) -> None:
        """Check all files."""
        for file in self._seen:
            self.check(file)

    def check(self, file: Path) -> None:
        """Check that a file is still the one that was opened, of the same size and date."""
        if self._stamp(file) != self._seen[file]:
            raise CheckpointMismatchError(
                f"{self._label}: {file} changed while it was read. Start again once nothing writes to it."
            )

    def _stamp(self, file: Path) -> tuple:
        try:
            found = os.stat(file)
        except OSError as error:
            raise CheckpointMismatchError(
                f"{self._label}: {file} cannot be read ({error}). Download or write it again."
            ) from error
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointMismatchError(
                f"{self._label}: {file} is no file. Download or write it again."
            )
        times = found.st_mtime_ns, found.st_ctime_ns
        return found.st_dev, found.st_ino, found.st_size, *times

    @property
    def content(self) -> dict[str, str]:
        """SHA-256 of every file, by name; what it was copied from has the same."""
        self.check_all()
        found = {file.name: file_digest(file) for file in self._seen}
        self.check_all()
        return found


def glimpse(file: Path) -> str:
    """A checksum of a file's size and of some blocks of it; of all of it, if it is of a few blocks."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    step = max((size - BLOCK) // (BLOCKS - 1), BLOCK)
    with file.open("rb") as held:
        for place in range(0, size, step):
            held.seek(place)
            digest.update(held.read(BLOCK))
    return digest.hexdigest()
