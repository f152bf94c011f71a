"""What a comparison has found so far, on disk.

::

    <directory>/settings.json        pools, seed and versions that all rows have in common
    <directory>/rows/<key>.json      one row, written anew after every evaluated task
    <directory>/searches/            what methods that search keep between runs
    <directory>/artifacts/<key>/     the model of a row, if asked for

A row is written beside its name and renamed, so that a file is whole whenever the process is killed. Everything else in
the directory follows from these files.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint.directory import is_ours, write_json
from ..checkpoint.fields import read_object
from ..errors import CheckpointMismatchError
from .entries import ComparisonError

SETTINGS, ROWS = "settings.json", "rows"
SEARCHES, ARTIFACTS = "searches", "artifacts"


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
            self._refuse(row["entry"], _plain(declared), f"entries.{key}.")

    def load(self, key: str) -> dict[str, Any] | None:
        file = self._file(key)
        if not file.is_file():
            return None
        row = _read(file)
        if not {"accuracy", "complete", "entry", "error"} <= row.keys():
            raise ComparisonError(
                f"{file} is no row of a comparison. Remove it, and the row is made anew."
            )
        return row

    def save(self, key: str, row: Mapping[str, Any]) -> None:
        write_json(self._file(key), row)

    def _forget(self) -> None:
        """Remove what runs left in the directory, and nothing else that lies there."""
        for file in self.rows.glob("*.json*"):
            file.unlink()
        for place in (self.directory / ARTIFACTS).glob("*"):
            if is_ours(place):
                shutil.rmtree(place)
        for place in (self.directory / SEARCHES).glob("*"):
            if (place / "search.json").is_file() or (place / "front.json").is_file():
                shutil.rmtree(place)
        (self.directory / SETTINGS).unlink(missing_ok=True)
        for name in (ROWS, ARTIFACTS, SEARCHES):
            with suppress(OSError):  # it does not exist, or something else lies there
                (self.directory / name).rmdir()

    def _file(self, key: str) -> Path:
        return self.rows / f"{key}.json"

    def _agree(self) -> None:
        file = self.directory / SETTINGS
        if file.is_file():
            self._refuse(_read(file), self.settings, "")
        elif any(self.rows.glob("*.json")):
            raise ComparisonError(
                f"{self.rows} holds rows, but {file} is missing, so nobody knows of which pools. "
                + _WAYS_OUT
            )
        write_json(file, self.settings)

    def _refuse(self, there: Any, here: Any, prefix: str) -> None:
        found = [prefix + line for line in differences(there, here)]
        if found:
            raise ComparisonError(
                f"{self.directory} holds rows of another configuration (there -> here):\n  "
                + "\n  ".join(found[:12])
                + (f"\n  and {len(found) - 12} more" if len(found) > 12 else "")
                + "\n"
                + _WAYS_OUT
            )


_WAYS_OUT = "Give another directory (path.log_dir=...), the same configuration, or restart=true to forget what is there."


def differences(there: Any, here: Any, path: str = "") -> list[str]:
    """One line per differing leaf, with its dotted name."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        lines = []
        for key in sorted({*there, *here}):
            name = f"{path}.{key}" if path else str(key)
            lines += differences(there.get(key), here.get(key), name)
        return lines
    return [] if there == here else [f"{path}: {there!r} -> {here!r}"]


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except CheckpointMismatchError as error:
        raise ComparisonError(
            f"{file} is damaged ({error}). Remove it, and what it held is made anew."
        ) from error


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))
