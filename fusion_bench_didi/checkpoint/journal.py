"""What a merge has finished, beside its output, so that one that was cut off goes on where it was.

A journal is a directory: ``journal.json`` says of what inputs, settings and versions it is; every process of every run adds
lines to a file of its own, one as it begins a tensor and one when that is done, with the SHA-256 of what was found. Small
findings are in the line, large ones in files beside it. A line that was cut off, or whose file is not what it says, counts as not
written, and what it was about is done again.
"""

import base64
import binascii
import hashlib
import json
import logging
import os
import secrets
import shutil
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
    spelled,
)
from ..files import file_digest, no_room
from .directory import journal_of, seen_by_all, write_json
from .fields import read_object, sealed
from .ours import CONFIG

log = logging.getLogger(__name__)

HEAD, FORMAT = "journal.json", 2
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
        return self.file.is_file() and file_digest(self.file) == self.digest


class Journal:
    """The journal of one merge, as one of its processes reads and writes it; used from several threads.

    Args:
        path: of the directory.
        run: of this run, the same on all ranks.
        rank: of this process.
    """

    def __init__(self, path: Path, run: str, rank: int):
        self.path = path
        self._name = f"{run}.{rank}"
        self._lock = threading.Lock()
        self._count = 0
        self._found = read_lines(path)
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
        with self._lock:
            self._out.write(json.dumps(told) + "\n")
            self._out.flush()

    def close(self) -> None:
        with suppress(OSError):  # a line that could not be written is tried again
            self._out.close()


def read_lines(path: Path) -> dict[tuple[str, str], Line]:
    """Results in the files of a journal, by stage and tensor; the last line counts, of the file that was written to last."""
    found = {}
    for file in sorted(path.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns):
        for text in file.read_text(errors="replace").splitlines():
            try:
                told = json.loads(text)
                if "done" not in told:
                    continue
                stage, name = told["done"]
                content = told.get("content")
                content = None if content is None else base64.b64decode(content)
                where = told.get("file")
                where = None if where is None else path / Path(where).name
                line = Line(told["facts"], told["sha256"], content, where)
            except (ValueError, KeyError, TypeError, binascii.Error):
                continue  # cut off as it was written
            found[stage, name] = line
    return found


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
    path, run = journal_of(place), None
    if ranks.leads:
        if fresh:
            remove(path)
        head = path / HEAD
        if path.exists() and _left_by_a_whole_one(path, place):
            remove(path)
        if path.exists():
            _check(head, identity)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise ResumeError(
                f"{path} is no directory, and what a merge into {place} has finished lies there until it is done. Move it away, or "
                "choose another directory."
            ) from error
        if not head.exists():
            write_json(head, sealed({"format": FORMAT, "of": dict(identity)}))
        run = secrets.token_hex(4)
    run = ranks.from_first(run)
    return Journal(path, run, ranks.rank) if seen_by_all(ranks, path) else None


def _left_by_a_whole_one(path: Path, place: Path) -> bool:
    """Whether a run was killed after its output had its name, and before its journal was gone."""
    try:
        written = (place / CONFIG).stat().st_mtime_ns
        return all(file.stat().st_mtime_ns <= written for file in path.iterdir())
    except OSError:
        return False


def _check(head: Path, identity: Mapping[str, str]) -> None:
    if not os.path.lexists(head):
        remove(head.parent)  # killed before there was anything
        return
    way_out = f"Choose another directory, or start over: {spelled('resume', 'fresh')}."
    try:
        before = read_object(head)
    except CheckpointMismatchError as error:
        raise ResumeError(
            f"A merge that was cut off lies in {head.parent}, and {HEAD} there cannot be read ({error.__cause__}). {way_out}"
        ) from error
    if before.get("format") != FORMAT or not isinstance(before.get("of"), dict):
        raise ResumeError(f"{head.parent} is the journal of another release. {way_out}")
    was = before["of"]
    differ = [key for key in (*was, *identity) if was.get(key) != identity.get(key)]
    differ = list(dict.fromkeys(differ))
    if differ:
        told = "\n  ".join(
            f"{key.removeprefix('method.')}: {identity.get(key, 'not there')}, was {was.get(key, 'not there')}"
            for key in differ[:8]
        )
        more = f"\n  and {len(differ) - 8} more" if len(differ) > 8 else ""
        raise ResumeError(
            f"A merge that was cut off lies in {head.parent}, and this is another one:\n  {told}{more}\nMake it what it was to "
            f"go on. {way_out}"
        )


def remove(path: Path) -> None:
    """A journal, if it is one."""
    if path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


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
            remove(journal.path)
        elif ranks.leads:
            log.warning(
                "What is finished lies in %s; the same command goes on from there.",
                journal.path,
            )
        if no_room(error) or isinstance(error, SafetensorError):
            raise DiDiError(
                f"{journal.path.parent} cannot be written to ({error}). What is finished stays in {journal.path.name}: make room, and "
                "run the same command again."
            ) from error
        raise
    finally:
        journal.close()
