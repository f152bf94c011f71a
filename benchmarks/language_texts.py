"""Texts of six domains from what lies on every machine that has this package: sources, headers, configurations, bytecode, catalogs.

Files are split by name, so that what is held out is of other files; catalogs of translated messages, which are single
files, by message. Of every file there is one excerpt, so that a text is of many files.
"""

import dis
import gettext
import io
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

#: characters of an excerpt, of a text to train on and of a held-out one
EXCERPT, TRAIN, HELD_OUT = 2400, 200_000, 24_000
#: every fifth file is held out
PARTS = 5
CATALOGS = "plone-app-locales==7.0.4"

Piece = tuple[str, str]


@dataclass(frozen=True)
class Domain:
    """A kind of text, and how an expert of it is made.

    Args:
        pieces: name and text of everything that there is.
        kind: every matrix but the embeddings tuned, or an adapter of low rank.
        prompt: what generation is shown on.
        steps, batch: of training, windows per step.
    """

    pieces: Callable[[], Iterator[Piece]]
    kind: str
    prompt: str
    steps: int = 28
    batch: int = 1


def _files(root: str, pattern: str, per_folder: int) -> Iterator[Piece]:
    """Excerpts from the middle, of at most so many files of a folder."""
    place = Path(sysconfig.get_paths()[root])
    taken: dict[Path, int] = {}
    for file in sorted(place.rglob(pattern)):
        inside = file.relative_to(place)
        if {"test", "tests", "idlelib", "site-packages"} & set(inside.parts):
            continue
        taken[file.parent] = taken.get(file.parent, 0) + 1
        if taken[file.parent] <= per_folder:
            yield str(inside), _middle(file.read_text(errors="ignore"))


def _middle(text: str) -> str:
    start = text.find("\n", max(0, (len(text) - EXCERPT) // 2)) + 1
    return text[start : start + EXCERPT]


def _bytecode() -> Iterator[Piece]:
    """What ``dis`` prints of the functions of the standard library."""
    for name, text in _files("stdlib", "*.py", 10**6):
        file = Path(sysconfig.get_paths()["stdlib"], name)
        printed = io.StringIO()
        try:
            code = compile(file.read_bytes(), name, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            continue
        functions = [c for c in code.co_consts if hasattr(c, "co_code")]
        for function in functions[:6]:
            dis.dis(function, depth=0, file=printed)
        if printed.tell() > EXCERPT:
            yield name, _middle(printed.getvalue())


def _messages(language: str) -> Iterator[Piece]:
    """Translated messages of the registry package of a content management system."""
    inside = f"plone/app/locales/locales/{language}/LC_MESSAGES/plone.mo"
    with tempfile.TemporaryDirectory() as scratch:
        line = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
        subprocess.run([*line, "-d", scratch, CATALOGS], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            file = io.BytesIO(archive.read(inside))
    catalog = gettext.GNUTranslations(file)._catalog
    for key, text in sorted((str(k), v) for k, v in catalog.items()):
        if key and len(text) > 40:
            yield key, text


DOMAINS = {
    "python": Domain(
        lambda: _files("stdlib", "*.py", 10**6),
        "full",
        "def read_config(path):\n",
    ),
    "headers": Domain(
        lambda: _files("purelib", "torch/include/**/*.h", 25),
        "adapter",
        "#pragma once\n\n#include <",
    ),
    "yaml": Domain(
        lambda: _files("purelib", "*.yaml", 6), "adapter", "_target_: "
    ),
    "bytecode": Domain(_bytecode, "full", "             26 LOAD_FAST "),
    "german": Domain(lambda: _messages("de"), "full", "Bitte geben Sie ", 40, 2),
    "french": Domain(lambda: _messages("fr"), "adapter", "Veuillez saisir "),
}  # fmt: skip


def write_texts(domain: str, place: Path) -> Path:
    """``train.txt`` and ``held_out.txt`` of a domain, where they are missing; the pieces are in an order by hash."""
    if not (place / "held_out.txt").is_file():
        place.mkdir(parents=True, exist_ok=True)
        found: dict[int, str] = {}
        for name, text in DOMAINS[domain].pieces():
            if text.strip():
                found.setdefault(zlib.crc32(name.encode()), text)
        held_out = [found[k] for k in sorted(found) if k % PARTS == 0]
        train = [found[k] for k in sorted(found) if k % PARTS]
        for name, texts, size in (
            ("train.txt", train, TRAIN),
            ("held_out.txt", held_out, HELD_OUT),
        ):
            (place / name).write_text(_upto(texts, size), encoding="utf-8")
    return place


def _upto(texts: list[str], size: int) -> str:
    """The first of them, until there are so many characters."""
    ends = list(accumulate(len(text) for text in texts))
    return "\n".join(texts[: bisect_left(ends, size) + 1])
