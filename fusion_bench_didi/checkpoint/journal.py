"""What a merge has finished, beside its output, so that one that was cut off goes on where it was.

A journal is a directory: ``journal.json`` says of what inputs, settings and versions it is; every process of every run adds
lines to a file of its own, one as it begins a tensor and one when that is done, with the SHA-256 of what was found. Small
findings are in the line, large ones in files beside it. Every line has a checksum of all of it, and that of ``journal.json``. One
that was cut off or altered, that is of another journal, or whose file is not what it says, counts as not written, and what it was
about is done again.
"""

import base64
import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..distributed.ranks import ALONE, Ranks
from ..errors import (
    BudgetError,
    CheckpointMismatchError,
    DiDiError,
    RankError,
    ResumeError,
    some,
    spelled,
)
from ..files import file_digest, is_regular, no_room
from .directory import journal_of, seen_by_all, write_json
from .fields import CHECKSUM, checksum, read_object, sealed
from .journal_files import HEAD, is_empty, is_whole, remove, strangers

log = logging.getLogger(__name__)

FORMAT = 3
#: The stage whose findings are what is stored.
ENCODED = "encode"
#: Findings up to this size are in the line.
INLINE = 2**15


@dataclass(frozen=True)
class Line:
    """A line of the journal: the result for one tensor.

    Args:
        facts: JSON-plain.
        digest: SHA-256 of ``content`` or of the file; "" where there is neither.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    content: bytes | None = None
    file: Path | None = None

    def whole(self) -> bool:
        """Whether what it names is what was written."""
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest() == self.digest
        if self.file is None:
            return True
        return is_regular(self.file) and file_digest(self.file) == self.digest


class Journal:
    """The journal of one merge, as one of its processes reads and writes it; used from several threads.

    Args:
        path: of the directory.
        run: of this run, the same on all ranks.
        rank: of this process.
        of: the checksum of its head.
    """

    def __init__(self, path: Path, run: str, rank: int, of: str):
        self.path, self._of = path, of
        self._name = f"{run}.{rank}"
        self._lock = threading.Lock()
        self._count = 0
        self._found = read_lines(path, of)
        self._sure: set[tuple[str, str]] = set()
        self._new: set[str] = set()
        self._out = (path / f"{self._name}.jsonl").open("a")

    def begin(self, stage: str, name: str) -> None:
        """Say that a tensor is being worked on."""
        self._write({"begin": [stage, name]})

    def find(self, stage: str, name: str) -> Line | None:
        """The result for a tensor, if it is as it was written."""
        line = self._found.get((stage, name))
        if line is None or (stage, name) in self._sure:
            return line
        if not line.whole():
            return None
        self._sure.add((stage, name))
        return line

    @property
    def stages(self) -> set[str]:
        """Stages in which something was finished, in earlier runs or by this process."""
        return {stage for stage, _ in self._found} | self._new

    def new_file(self) -> Path:
        """Where a large finding may be written; it counts once :meth:`done` names it."""
        with self._lock:
            self._count += 1
            return self.path / f"{self._name}.{self._count:06d}.safetensors"

    def done(
        self,
        stage: str,
        name: str,
        *,
        content: bytes | None = None,
        file: Path | None = None,
        digest: str = "",
        facts: Mapping[str, Any] = {},
    ) -> None:
        """Say that a tensor is finished.

        Args:
            content: what was found.
            file: or where it lies, whose SHA-256 is ``digest``.
        """
        if content is not None:
            digest = hashlib.sha256(content).hexdigest()
            if len(content) > INLINE:
                file = self.new_file()
                file.write_bytes(content)
        told: dict[str, Any] = {"done": [stage, name], "sha256": digest}
        if file is not None:
            told["file"] = file.name
        elif content is not None:
            told["content"] = base64.b64encode(content).decode()
        self._write({**told, "facts": dict(facts)})
        self._new.add(stage)

    def _write(self, told: Mapping[str, Any]) -> None:
        line = json.dumps(sealed({**told, "of": self._of}, finite=False))
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()

    def close(self) -> None:
        with suppress(OSError):  # a line that could not be written is tried again
            self._out.close()


def read_lines(path: Path, of: str) -> dict[tuple[str, str], Line]:
    """Results in the files of a journal, by stage and tensor; the last line counts, of the file that was written to last.

    Args:
        of: the checksum of its head.
    """
    found = {}
    files = [file for file in path.glob("*.jsonl") if is_regular(file)]
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        for text in _texts(file):
            try:
                told = json.loads(text)
                if told[CHECKSUM] != checksum(told) or told["of"] != of:
                    continue
                stage, name = told["done"]  # missing where something begins
                content = told.get("content")
                content = None if content is None else base64.b64decode(content)
                where = told.get("file")
                where = None if where is None else path / Path(where).name
                line = Line(told["facts"], told["sha256"], content, where)
                found[stage, name] = line
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # cut off as it was written, or altered
    return found


def _texts(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def open_journal(
    place: Path,
    identity: Mapping[str, str],
    *,
    fresh: bool = False,
    ranks: Ranks = ALONE,
) -> Journal | None:
    """The journal beside an output, which goes on if there is one; None where not every rank sees it.

    Args:
        place: of the output; nobody else writes there.
        identity: what a merge that goes on must have in common with its beginning, by name; rank 0's counts.
        fresh: forget what there is.

    Raises:
        ResumeError: naming what differs, or if something else lies there.
    """
    path, begun = journal_of(place), None
    if ranks.leads:
        with _usable(path):
            begun = secrets.token_hex(4), _headed(path, place, identity, fresh)
    run, of = ranks.from_first(begun)
    if not seen_by_all(ranks, path):
        return None
    with _usable(path):
        return Journal(path, run, ranks.rank, of)


def check_journal(place: Path) -> None:
    """Check that beside an output there is a journal, or room for one; nothing is touched.

    To be called before long work.

    Raises:
        ResumeError: if something else lies there.
    """
    path = journal_of(place)
    if not os.path.lexists(path):
        return
    there = f"{path}, where a merge into {place} leaves what it has finished,"
    way_out = "Move it away, or choose another directory."
    if path.is_symlink() or not path.is_dir():
        raise ResumeError(f"{there} is no directory. {way_out}")
    with _usable(path):
        found = strangers(path)
    if found:
        raise ResumeError(
            f"{there} holds {some(found)}, which no merge wrote. {way_out}"
        )


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if no_room(error):
            raise
        raise ResumeError(
            f"{path} cannot be used ({error}). Change its rights, or choose another directory."
        ) from error


def _headed(path: Path, place: Path, identity: Mapping[str, str], fresh: bool) -> str:
    """The checksum of the head of a journal, which is there from then on."""
    check_journal(place)
    if path.exists() and (fresh or is_whole(path, place)):
        remove(path)
    path.mkdir(exist_ok=True)
    if not is_empty(path):
        return _checked(path / HEAD, identity)
    head = sealed({"format": FORMAT, "of": dict(identity)})
    write_json(path / HEAD, head)
    return head[CHECKSUM]


def _checked(head: Path, identity: Mapping[str, str]) -> str:
    """The checksum of the head of a journal that goes on."""
    way_out = f"Choose another directory, or start over: {spelled('resume', 'fresh')}."
    try:
        before = read_object(head)
    except CheckpointMismatchError as error:
        raise ResumeError(
            f"A merge that was cut off lies in {head.parent}, and {HEAD} there cannot be read ({error.__cause__}). {way_out}"
        ) from error
    if before["format"] != FORMAT or CHECKSUM not in before:
        raise ResumeError(
            f"{head.parent} is the journal of another release, or damaged. {way_out}"
        )
    was = before["of"]
    keys = {**was, **identity}
    if differ := [key for key in keys if was.get(key) != identity.get(key)]:
        told = "\n  ".join(
            f"{key.removeprefix('method.')}: {identity.get(key, 'not there')}, was {was.get(key, 'not there')}"
            for key in differ[:8]
        )
        more = f"\n  and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise ResumeError(
            f"A merge that was cut off lies in {head.parent}, and this is another one:\n  {told}{more}\nMake it what it was to "
            f"go on. {way_out}"
        )
    return before[CHECKSUM]


@contextmanager
def left_if_worth(journal: Journal, ranks: Ranks = ALONE) -> Iterator[None]:
    """The journal is closed with the block, and stays if it fails, unless all that it holds is from the first look at an input
    that cannot be merged, or what would go on is a budget that is refused.

    Raises:
        DiDiError: in place of what the system says where there is no room.
    """
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, DiDiError) and not isinstance(error, RankError)
        begun = [stage for stage in journal.stages if not stage.startswith("scan")]
        if ranks.leads and refused and (not begun or isinstance(error, BudgetError)):
            with suppress(OSError):
                remove(journal.path)
        elif ranks.leads:
            log.warning(
                "What is finished lies in %s; the same command goes on from there.",
                journal.path,
            )
        if no_room(error):
            raise DiDiError(
                f"{journal.path.parent} cannot be written to ({error}). What is finished stays in {journal.path.name}: make room, and "
                "run the same command again."
            ) from error
        if isinstance(error, SafetensorError):
            raise DiDiError(
                f"What is finished, in {journal.path}, cannot be read or written ({error}). Run the same command again, or start "
                f"over: {spelled('resume', 'fresh')}."
            ) from error
        raise
    finally:
        journal.close()
