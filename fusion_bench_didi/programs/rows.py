"""What a comparison has found so far, on disk.

::

    <directory>/settings.json        pools, seed and versions that all rows have in common
    <directory>/models.json          checksums of the checkpoints' files
    <directory>/data.json            checksums of the files that are evaluated on
    <directory>/rows/<key>.json      one row, written anew after every evaluated task
    <directory>/searches/            what methods that search keep between runs
    <directory>/artifacts/<key>/     the model of a row, if asked for

A row is written beside its name and renamed, so that a file is whole whenever the process is killed, and sealed by a checksum.
Everything else in the directory follows from these files.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint.directory import write_json
from ..checkpoint.fields import CHECKSUM, Field, read_object, sealed
from ..checkpoint.ours import is_ours
from ..errors import CheckpointMismatchError, spelled
from ..report.comparison import told_settings
from .entries import ComparisonError
from .results import FIGURES

SETTINGS, ROWS, COMPARISON = "settings.json", "rows", "comparison.json"
MODELS, DATA = "models.json", "data.json"
SEARCHES, ARTIFACTS = "searches", "artifacts"
#: The directory of the run, in paths that rows name.
HERE = "<run>"


class RowStore:
    """The rows of one directory, all of one configuration.

    Args:
        directory: of the run.
        settings: JSON-plain; what must be equal for rows to be comparable.
        restart: forget what is there.

    Raises:
        ComparisonError: naming each key in which what is there differs, and the ways out.
    """

    def __init__(
        self,
        directory: str | Path,
        settings: Mapping[str, Any],
        *,
        restart: bool = False,
    ):
        self.directory = Path(directory)
        self.rows = self.directory / ROWS
        self.settings = _plain(settings)
        if restart:
            self._forget()
        self.rows.mkdir(parents=True, exist_ok=True)
        self._agree()

    def check(self, key: str, declared: Mapping[str, Any]) -> None:
        """The figures on disk, if any, must be of the entry as it is declared now.

        Raises:
            ComparisonError: as for the settings.
        """
        row = self.load(key)
        if row is not None and row["accuracy"]:
            there, here = self._movable(row["entry"]), self._movable(declared)
            self._refuse(there, here, f"entries.{key}.")

    def agree_on_models(self, found: Mapping[str, Mapping[str, str]]) -> None:
        """What is there must have been found with the same models.

        Args:
            found: checksums by model and file.

        Raises:
            ComparisonError: as for the settings.
        """
        self._agree_on(MODELS, found, "checkpoints of ")

    def agree_on_data(self, found: Mapping[str, Mapping[str, str]]) -> None:
        """What is there must have been evaluated on the same files.

        Args:
            found: checksums by task, or by what files are to the task pool, and by file.

        Raises:
            ComparisonError: as for the settings.
        """
        self._agree_on(DATA, found, "evaluation files of ")

    def load(self, key: str) -> dict[str, Any] | None:
        return read_row(self.directory, key)

    def save(self, key: str, row: Mapping[str, Any]) -> None:
        entry = self._movable(row["entry"])
        self.rows.mkdir(exist_ok=True)  # something may have cleared it away
        write_json(self._file(key), sealed({**row, "entry": entry}, finite=False))

    def _movable(self, entry: Any) -> Any:
        """Paths in the directory of the run as seen from it, so that a run that was moved goes on."""
        if isinstance(entry, Mapping):
            return {key: self._movable(value) for key, value in entry.items()}
        if isinstance(entry, (list, tuple)):
            return [self._movable(value) for value in entry]
        if isinstance(entry, str):
            for place in (str(self.directory), str(self.directory.absolute())):
                if entry.startswith(place + os.sep):
                    return os.path.join(HERE, entry[len(place) + 1 :])
        return entry

    def _forget(self) -> None:
        """Remove what runs left in the directory, and nothing else that lies there."""
        settings = self.directory / SETTINGS
        if settings.exists() and not is_ours(self.directory, SETTINGS):
            raise ComparisonError(
                f"{settings} is not that of a comparison, so nothing is removed. Give another directory "
                f"({spelled('path.log_dir', '...')})."
            )
        for file in self.rows.glob("*.json*"):
            if file.suffix == ".tmp" or _is_row(file):
                file.unlink()
        for place in (self.directory / ARTIFACTS).glob("*"):
            if is_ours(place) and not place.is_symlink():
                shutil.rmtree(place)
        for place in (self.directory / SEARCHES).glob("*"):
            found = (place / name for name in ("search.json", "front.json"))
            if any(file.is_file() for file in found) and not place.is_symlink():
                shutil.rmtree(place)
        if settings.exists():
            for name in (COMPARISON, MODELS, DATA):
                (self.directory / name).unlink(missing_ok=True)
            settings.unlink()
        for name in (ROWS, ARTIFACTS, SEARCHES):
            with suppress(OSError):  # it does not exist, or something else lies there
                (self.directory / name).rmdir()

    def _file(self, key: str) -> Path:
        return self.rows / f"{key}.json"

    def _agree(self) -> None:
        file = self.directory / SETTINGS
        for place in (self.directory / name for name in (COMPARISON, MODELS, DATA)):
            if os.path.lexists(place) and not place.is_file():
                raise ComparisonError(
                    f"{place} is no file, so that nothing can be written there. Remove it, or give another directory "
                    f"({spelled('path.log_dir', '...')})."
                )
        rows = any(map(_is_row, self.rows.glob("*.json")))
        left = (COMPARISON, ARTIFACTS, SEARCHES)
        made = rows or any((self.directory / name).exists() for name in left)
        if os.path.lexists(file):
            there = _read(file)
            if made or not is_ours(self.directory, SETTINGS):
                here = told_settings(self.settings)
                self._refuse(told_settings(there), here, "")
                return
            # of a run that ended before its first row: nothing is of that configuration
        if rows:
            raise ComparisonError(
                f"{self.rows} holds rows, but {file} is missing, so nobody knows of which pools. "
                + _ways_out()
            )
        if (self.directory / COMPARISON).exists():
            raise ComparisonError(
                f"{self.directory} holds a {COMPARISON}, but no {SETTINGS}, so it may be of something else. Give another directory "
                f"({spelled('path.log_dir', '...')}), or remove that file."
            )
        write_json(file, sealed(self.settings, finite=False))

    def _agree_on(self, name: str, found: Mapping[str, Any], prefix: str) -> None:
        """What rows have in common, which those of before it was written are taken to have."""
        file, here = self.directory / name, _plain(found)
        if os.path.lexists(file) and any(map(_is_row, self.rows.glob("*.json"))):
            self._refuse(_read(file), here, prefix)
        else:
            write_json(file, sealed(here, finite=False))

    def _refuse(self, there: Any, here: Any, prefix: str) -> None:
        found = [prefix + line for line in differences(there, here)]
        if found:
            raise ComparisonError(
                f"{self.directory} holds rows of another configuration (there -> here):\n  "
                + "\n  ".join(found[:12])
                + (f"\n  and {len(found) - 12} more" if len(found) > 12 else "")
                + "\n"
                + _ways_out()
            )


def read_row(directory: Path, key: str) -> dict[str, Any] | None:
    """The row of a key in the directory of a run, None where there is none."""
    file = directory / ROWS / f"{key}.json"
    if not os.path.lexists(file):
        return None
    return _read(file, lambda row: _check_row(row, key))


def _ways_out() -> str:
    where = spelled("path.log_dir", "...")
    return f"Give another directory ({where}), the same configuration, or restart=true to forget what is there."


def differences(there: Any, here: Any, path: str = "") -> list[str]:
    """One line per differing leaf, with its dotted name."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        lines = []
        for key in sorted({*there, *here}):
            name = f"{path}.{key}" if path else str(key)
            lines += differences(there.get(key), here.get(key), name)
        return lines
    return [] if there == here else [f"{path}: {there!r} -> {here!r}"]


def _check_row(row: Field, key: str) -> None:
    """Check that the fields of a row that are worked with are there, and of their types."""
    row["key"].one_of([key])
    row["method"].text()
    for name in FIGURES:
        if row[name].value is not None:
            row[name].number()
    for _, accuracy in row["accuracy"].entries():
        accuracy.number()
    for _, loss in row["loss"].entries() if "loss" in row else ():
        loss.number()
    for _, metric in row["metrics"].entries() if "metrics" in row else ():
        metric.text()
    for note in row["notes"].elements():
        note.text()
    row["entry"].mapping()
    method = row["entry"]["method"]
    if not isinstance(method.value, Mapping):
        method.text()
    if row["error"].value is not None:
        row["error"].text()
    if type(row["complete"].value) is not bool:
        row["complete"].fail("true or false")
    if row["complete"].value:
        row["x_excl"].number()
        if not row["accuracy"].value:
            row["accuracy"].fail("that of every task")


def _is_row(file: Path) -> bool:
    try:
        return {"accuracy", "complete", "entry", "error"} <= read_object(
            file, whole=False
        ).keys()
    except CheckpointMismatchError:
        return False


def _read(
    file: Path, check: Callable[[Field], None] = lambda _: None
) -> dict[str, Any]:
    try:
        found = read_object(file, finite=False)
        check(Field(file, found))
    except CheckpointMismatchError as error:
        raise ComparisonError(
            f"{file} is damaged ({error}). Remove it, and what it held is made anew."
        ) from error
    return {k: v for k, v in found.items() if k != CHECKSUM}


def _plain(value: Any) -> Any:
    """A value as it comes back from a file."""
    return json.loads(json.dumps(value))
