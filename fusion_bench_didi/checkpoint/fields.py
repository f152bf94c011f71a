"""JSON files that may hold anything: read strictly, and every value held against what it should be.

A bit that flipped, a file of something else and a file made to do harm are all met in the same way: by one error that names
the file, the field, what was found and what was expected.
"""

import hashlib
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointMismatchError

CHECKSUM = "checksum"
_WAY_OUT = "Copy or write the whole directory again."
#: Sizes and counts of bits stay below this.
_LARGEST = 2**63 - 1
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Field:
    """A value of a JSON file and where it stands there; its methods return the value if it is what their names say.

    Args:
        file: for messages.
        value: JSON-plain.
        path: such as ``deltas[3].shape``; empty for the whole file.

    Raises:
        CheckpointMismatchError: from every method, if the value is something else.
    """

    __slots__ = ("file", "value", "path")

    def __init__(self, file: Path, value: Any, path: str = ""):
        self.file, self.value, self.path = file, value, path

    def fail(self, expected: str) -> NoReturn:
        found = _SHORT.repr(self.value)
        what = f"{self.path} is {found}" if self.path else f"it holds {found}"
        raise CheckpointMismatchError(
            f"{self.file}: {what}, expected {expected}. {_WAY_OUT}"
        )

    def __contains__(self, key: str) -> bool:
        return key in self.mapping()

    def __getitem__(self, key: str) -> "Field":
        found = self.mapping()
        path = f"{self.path}.{key}" if self.path else key
        if key not in found:
            raise CheckpointMismatchError(f"{self.file}: {path} is missing. {_WAY_OUT}")
        return Field(self.file, found[key], path)

    def mapping(self) -> Mapping[str, Any]:
        if not isinstance(self.value, Mapping):
            self.fail("an object")
        return self.value

    def entries(self) -> Iterator[tuple[str, "Field"]]:
        """Keys and values of an object; keys are as :meth:`text` wants them."""
        for key in self.mapping():
            yield Field(self.file, key, f"a key of {self.path}").text(), self[key]

    def elements(self) -> list["Field"]:
        """Elements of a list."""
        if not isinstance(self.value, (list, tuple)):
            self.fail("a list")
        return [
            Field(self.file, value, f"{self.path}[{i}]")
            for i, value in enumerate(self.value)
        ]

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.fail("a string")
        try:
            self.value.encode()
        except UnicodeEncodeError:
            self.fail("a string of whole characters")
        return self.value

    def texts(self) -> list[str]:
        """Strings, each once."""
        found = [field.text() for field in self.elements()]
        if len(set(found)) < len(found):
            self.fail("every string once")
        return found

    def integer(self, low: int = 0, high: int = _LARGEST) -> int:
        if type(self.value) is not int or not low <= self.value <= high:
            self.fail(f"a whole number from {low} to {high}")
        return self.value

    def one_of(self, choices: Container[str]) -> str:
        if not isinstance(self.value, str) or self.value not in choices:
            self.fail(f"one of {', '.join(sorted(choices))}")
        return self.value

    def number(self) -> float:
        if type(self.value) not in (int, float):
            self.fail("a number")
        return self.value

    def shape(self) -> tuple[int, ...]:
        """Shape of a tensor."""
        sides = tuple(field.integer() for field in self.elements())
        if len(sides) > 16 or math.prod(sides) > _LARGEST:
            self.fail("the shape of a tensor")
        return sides

    def digest(self) -> str:
        """A SHA-256 in hexadecimal."""
        if not is_digest(self.text()):
            self.fail("a SHA-256")
        return self.value

    def files(self) -> dict[str, str]:
        """SHA-256 by name of a file in the same directory."""
        found = {}
        for name, digest in self.entries():
            if not is_plain(name):
                digest.fail("a file of the same directory")
            found[name] = digest.digest()
        return found


def is_digest(text: str) -> bool:
    """Whether a text is a SHA-256 in hexadecimal."""
    return _DIGEST.fullmatch(text) is not None


def is_plain(name: str) -> bool:
    """Whether a name is that of a file or directory, and no way to another."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def inside(directory: Path, name: str) -> Path:
    """A file or directory in a directory; neither it nor a link on the way leads out.

    In a snapshot of the hub's cache files are links to the blobs of the same repository, which count as inside.

    Raises:
        CheckpointMismatchError: if it does lead out.
    """
    path, home = directory / name, Path(os.path.realpath(directory))
    if is_plain(name):
        real = Path(os.path.realpath(path))
        blobs = [p.parent / "blobs" for p in home.parents if p.name == "snapshots"]
        if home in real.parents or real.parent in blobs:
            return path
    raise CheckpointMismatchError(
        f"{directory}: {name!r} leads out of the directory, expected what lies in it. Do not use these files if you did not "
        "write them yourself; else copy the whole directory, links followed."
    )


def read_object(
    file: Path, *, whole: bool = True, finite: bool = True
) -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        whole: it must be as it was when it was sealed, if it was.
        finite: as for :func:`sealed`.

    Raises:
        CheckpointMismatchError: if it is no file, no JSON, ambiguous (a key twice), or was altered after it was sealed.
    """
    odd: list[str] = []
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise ValueError("it is no file")
        found = json.loads(
            file.read_bytes().decode(),
            object_pairs_hook=_each_once,
            parse_constant=lambda name: odd.append(name) or float(name),
        )
        if not isinstance(found, dict):
            raise ValueError(f"it holds no object but {type(found).__name__}")
        if whole and CHECKSUM in found:
            if odd and finite:
                raise ValueError(f"{odd[0]} is no number")
            if found[CHECKSUM] != checksum(found):
                raise ValueError("it was altered after it was written")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointMismatchError(
            f"{file} cannot be read: {error}. {_WAY_OUT}"
        ) from error
    return found


def sealed(value: Mapping[str, Any], *, finite: bool = True) -> dict[str, Any]:
    """An object with a checksum, as it comes back from a file.

    Args:
        finite: JSON has no infinity and no NaN; they become strings that ``float`` understands. Else they are written as
            Python writes and reads them.
    """
    plain = json.loads(json.dumps(_finite(value) if finite else value))
    return {**plain, CHECKSUM: checksum(plain)}


def checksum(value: Mapping[str, Any]) -> str:
    """SHA-256 of all other fields, whatever their order."""
    content = {k: v for k, v in value.items() if k != CHECKSUM}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return found
