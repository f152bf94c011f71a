"""Directories and files that appear whole or not at all, and replace nothing that is not ours.

A merged model is a directory: ``model.safetensors`` (in shards above some size, with an index), ``config.json`` and a model
card. It is written beside its place, which is locked meanwhile, and put there in one step.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..distributed.ranks import Ranks
from ..errors import DiDiError, RankError, spelled
from ..files import from_home, no_room, sync, write_whole
from .exchange import exchange, rename_new
from .journal_files import is_journal, note_whole, remove
from .locks import held, is_held
from .ours import SAVED, Kind

#: In the names of directories that are being written: those of other programs are left alone.
_OURS = "didi-"
#: Names are cut to so many bytes where others are made of them.
_LONGEST = 200
#: Seconds between two looks at a lock that someone else holds.
_PAUSE = 0.05


def check_target(
    target: str | Path,
    *,
    overwrite: bool = False,
    probe: bool = True,
    kind: Kind = SAVED,
) -> Path:
    """The directory that would be written for a target; nothing is touched.

    To be called before long work whose result goes there. A link stays, what it points to is written.

    Args:
        probe: look whether another run is writing to it.
        kind: of directory.

    Raises:
        FileExistsError: if it exists and may not be replaced: without ``overwrite`` nothing may, with it a model saved by
            this package.
        DiDiError: if another run is writing to it, or it cannot be made.
    """
    if not str(target).strip():
        raise DiDiError("The name of the directory to write is empty. Give one.")
    try:
        place = Path(os.path.realpath(from_home(target)))
        os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise DiDiError(
            f"{str(target)[:_LONGEST]} cannot be made ({error}). Choose another directory."
        ) from error
    else:
        _check_replaceable(target, place, overwrite, kind)
    parent = next(p for p in place.parents if os.path.lexists(p))
    if not parent.is_dir():
        raise DiDiError(
            f"{target} cannot be made: {parent} is no directory. Choose another directory."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DiDiError(
            f"{target} cannot be made: {parent} may not be written to. Choose another directory, or change its rights."
        )
    if probe and is_held(_lock(place)):
        raise _busy(target)
    return place


def _check_replaceable(
    target: str | Path, place: Path, overwrite: bool, kind: Kind
) -> None:
    if not place.is_dir():
        found = "a file" if place.is_file() else "neither a file nor a directory"
        raise FileExistsError(
            f"{target} is {found}, so no directory is made of it. Choose another directory."
        )
    found = kind.found(place)
    if found is None and any(place.iterdir()):
        raise FileExistsError(
            f"{target} exists and is no saved model of this package ({kind.mark} does not say so), so it is not overwritten. "
            "Choose another directory."
        )
    if strange := sorted(found.others(place)) if found else []:
        raise FileExistsError(
            f"{target} also holds {', '.join(strange[:4])}, which this package did not write and which would be lost, so it is not "
            "overwritten. Put that elsewhere, or choose another directory."
        )
    if os.path.ismount(place):
        raise FileExistsError(
            f"{target} is a mounted file system and cannot be replaced. Choose a directory in it."
        )
    if not overwrite:
        raise FileExistsError(
            f"{target} exists. Choose another directory, or replace it: {spelled('overwrite', 'true')}."
        )


@contextmanager
def whole_directory(
    target: str | Path,
    *,
    overwrite: bool = False,
    kind: Kind = SAVED,
    sure: bool | None = None,
) -> Iterator[Path]:
    """A directory to write into that takes its name only when the block ends well.

    While the block runs no other run may write to the target. What dead runs left beside it is removed; files that someone put
    into a directory that is replaced stay in it.

    Args:
        kind: of directory; the block has to write its mark.
        sure: what :func:`alone` gave, in whose block this one is; it is called here if None.

    Raises:
        FileExistsError, DiDiError: as by :func:`check_target`, before the block and, if the target came to be meanwhile,
            after it; the result is kept under another name then.
    """
    place = check_target(target, overwrite=overwrite, probe=sure is None, kind=kind)
    lock = alone(place, named=target) if sure is None else nullcontext(sure)
    with lock as sure:
        if sure:
            _sweep(place)
        check_target(place, overwrite=overwrite, probe=False, kind=kind)
        name = f".{_short(place.name)}.{_OURS}"
        beside = Path(tempfile.mkdtemp(prefix=name, suffix=".tmp", dir=place.parent))
        kept = False
        try:
            try:
                yield beside
                _open_up(beside)
                _flush(beside)
                note_whole(journal_of(place), beside / kind.mark)
            except (OSError, SafetensorError) as error:
                if not (no_room(error) or isinstance(error, SafetensorError)):
                    raise
                room = "make room, or " if no_room(error) else ""
                raise DiDiError(
                    f"{target} cannot be written ({error}). Nothing was changed there; {room}choose another directory."
                ) from error
            try:
                _put(beside, place, overwrite, kind)
            except FileExistsError:
                kept = True
                raise
            sync(place.parent)
            if is_journal(journal_of(place)):
                with suppress(OSError):
                    remove(journal_of(place))
        finally:
            if beside.exists() and not kept:
                shutil.rmtree(beside)


@contextmanager
def common_directory(
    ranks: Ranks, target: str | Path, *, overwrite: bool = False
) -> Iterator[Path]:
    """:func:`whole_directory` for several ranks that write together: rank 0 makes it and puts it in its place.

    Raises:
        RankError: if another rank failed, or does not see the directory.
    """
    with ExitStack() as stack:
        place = None
        if ranks.leads:
            made = whole_directory(target, overwrite=overwrite)
            place = stack.enter_context(made)
        place = ranks.from_first(place)
        check_seen(ranks, place)
        yield place
        ranks.gather(None)  # nobody writes any more
    ranks.gather(None)  # it has its name


def check_seen(ranks: Ranks, path: Path) -> None:
    """Check that every rank sees what rank 0 has made.

    Raises:
        RankError: if what rank 0 has made is not there for every rank.
    """
    if not seen_by_all(ranks, path):
        raise RankError(
            f"Not every rank sees {path.parent}, which rank 0 writes to. Choose a directory that all machines share."
        )


def seen_by_all(ranks: Ranks, path: Path) -> bool:
    """Whether what rank 0 has made is there for every rank."""
    return all(ranks.gather(path.exists()))


@contextmanager
def alone(
    place: Path, *, named: str | Path | None = None, patience: float = 0.0
) -> Iterator[bool]:
    """While the block runs, no other run writes there; False where the file system has no locks.

    Args:
        place: a file or directory; what it shall lie in is made.
        named: as messages call it.
        patience: seconds to wait for another run.

    Raises:
        DiDiError: if another run is writing there, or it cannot be locked.
    """
    target, end = named or place, time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                sure = stack.enter_context(held(_lock(place)))
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise _busy(target) from None
                time.sleep(_PAUSE)
            except OSError as error:
                raise DiDiError(
                    f"{target} cannot be locked ({error}). Choose another directory, or remove what is in the way."
                ) from error
        yield sure


def _put(beside: Path, place: Path, overwrite: bool, kind: Kind) -> None:
    """Give what was written its name; if it cannot be had any more, another one."""
    try:
        if os.path.lexists(place):
            check_target(place, overwrite=overwrite, probe=False, kind=kind)
            _keep_notes(place, beside, kind)
            exchange(beside, place)
        else:
            rename_new(beside, place)
    except (OSError, DiDiError) as error:
        kept = place.with_name(f"{_short(place.name)}-{beside.stem[-8:]}")
        try:
            os.rename(beside, kept)
        except OSError:
            kept = beside
        raise FileExistsError(
            f"{place} was changed by something else while this was written; what was written is in {kept}. ({error})"
        ) from error


def _keep_notes(place: Path, beside: Path, kind: Kind) -> None:
    """Files that someone put beside a saved model stay when it is replaced."""
    for inside in (kind.found(place) or kind).notes(place):
        target = beside / inside
        if os.path.lexists(target):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(place / inside, target, follow_symlinks=False)
        except (OSError, NotImplementedError):  # no links, or not of links
            shutil.copy2(place / inside, target, follow_symlinks=False)
            if not target.is_symlink():
                sync(target)
        sync(target.parent)


def _busy(target: str | Path) -> DiDiError:
    return DiDiError(
        f"Another run is writing to {target}. Wait for it, or choose another directory."
    )


def journal_of(place: str | Path) -> Path:
    """Where a merge into a place leaves what it has finished, until the place holds all of it."""
    place = Path(os.path.realpath(from_home(place)))
    return place.with_name(f".{_short(place.name)}.journal")


def _lock(place: Path) -> Path:
    return place.with_name(f".{_short(place.name)}.lock")


def _short(name: str) -> str:
    """The name, or something that stands for it where files of longer names could not be made."""
    if len(os.fsencode(name)) <= _LONGEST:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f"{name[: _LONGEST // 4]}~{digest}"


def _sweep(place: Path) -> None:
    """Remove what dead runs left beside a target; whoever holds its lock knows that they are dead."""
    name = re.escape(f".{_short(place.name)}.{_OURS}")
    left = re.compile(rf"{name}[a-z0-9_]{{8}}\.(tmp|old)")
    for path in sorted(place.parent.iterdir()):
        found = left.fullmatch(path.name)
        if found and path.is_dir() and not path.is_symlink():
            if found[1] == "old" and not os.path.lexists(place):
                os.rename(path, place)  # it was killed between two renames
            else:
                shutil.rmtree(path)


def sweep(place: Path) -> None:
    """Remove what dead runs left beside a target, unless a run is writing there."""
    with suppress(DiDiError), alone(place) as sure:
        if sure:
            _sweep(place)


def _open_up(directory: Path) -> None:
    """Temporary files are private; what they become has the rights of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(directory, 0o777 & ~umask)
    for file in directory.rglob("*"):
        os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~umask)


def _flush(directory: Path) -> None:
    """Everything in it to the disk, so that its name does not come before its content."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; it appears whole or not at all."""
    write_whole(path, json.dumps(value, indent=1) + "\n")
