"""Files of a journal: which of a directory are, what says that they are not needed any more, and their removal, which leaves
everything else that lies there alone."""

import re
from contextlib import suppress
from pathlib import Path

from ..errors import CheckpointMismatchError
from ..files import MARK, file_digest, is_regular, write_whole
from .fields import read_object
from .ours import CONFIG, PLAIN

HEAD = "journal.json"
#: Tells what the output, once it has its name, says of itself.
_WHOLE = "whole"
#: Head and mark, lines, findings, what each is while it is written, and what NFS calls those that are open as they are removed.
_FILE = re.compile(
    rf"({HEAD}|{_WHOLE})(\.tmp)?|[0-9a-f]+\.\d+\.(jsonl|\d{{6,}}\.safetensors)|\.tmp\w{{6}}|\.nfs[0-9a-f]+"
)


def is_journal(path: Path) -> bool:
    """Whether a directory says that it is a journal of this package, or holds nothing."""
    try:
        return not path.is_symlink() and (is_empty(path) or _says_so(path / HEAD))
    except (OSError, CheckpointMismatchError):
        return False


def is_empty(path: Path) -> bool:
    """Whether a run was killed before it had said what its journal is, or after all of that was removed."""
    return all(file.name == f"{HEAD}.tmp" for file in path.iterdir())


def _says_so(head: Path) -> bool:
    found = read_object(head, whole=False)
    of = found.get("of")
    by = isinstance(of, dict) and f"version of {MARK}" in of
    return type(found.get("format")) is int and by


def strangers(path: Path) -> list[str]:
    """What lies in a directory and is not of a journal; a head that cannot be read is."""
    found = [file.name for file in path.iterdir() if not _is_part(file)]
    with suppress(CheckpointMismatchError):
        if not _says_so(path / HEAD):
            found.append(HEAD)
    return found


def _is_part(file: Path) -> bool:
    if not _FILE.fullmatch(file.name):
        return False
    return file.is_symlink() or not file.is_dir() or not any(file.iterdir())


def remove(path: Path) -> None:
    """Remove a journal's files, those last that say what they are, and the directory if nothing else lies there."""
    files = [file for file in path.iterdir() if _is_part(file)]
    for file in sorted(
        files, key=lambda file: (file.name == HEAD, file.name == _WHOLE)
    ):
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
    with suppress(OSError):  # something else lies there
        path.rmdir()


def note_whole(path: Path, mark: Path) -> None:
    """Say in a journal, if there is one, that all it holds is in an output that is about to get its name.

    Args:
        mark: the file of the output that says what it is.
    """
    if is_journal(path) and not is_empty(path):
        write_whole(path / _WHOLE, file_digest(mark))


def is_whole(path: Path, place: Path) -> bool:
    """Whether a run was killed after its output had its name, and before its journal was gone."""
    marks = [place / name for name in (CONFIG, PLAIN)]
    told = path / _WHOLE
    try:
        if not is_regular(told):
            return False
        whole = told.read_text(errors="replace")
        return any(is_regular(m) and file_digest(m) == whole for m in marks)
    except OSError:
        return False
