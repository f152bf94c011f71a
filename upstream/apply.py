"""Apply the contributions to a source tree of FusionBench: a released source distribution or a checkout.

A contribution is a folder of new files in the host's layout (``files/``) and a few edits of existing ones (``edits.yaml``).
Nothing is written unless everything fits. What a source distribution does not ship (``docs/``, ``mkdocs.yml``) is left out
there, and named.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
#: In this order: the third stores its model as the second does.
CONTRIBUTIONS = ("task_aware_evaluation", "tsv_c", "didi_merging")
#: Folders of a checkout under the names that they have in a source distribution.
SHIPPED_AS = {"config": "fusion_bench_config"}
#: Folders of a checkout that a source distribution does not have.
NOT_SHIPPED = ("docs", "mkdocs.yml", "README.md")


class DoesNotFit(Exception):
    """The tree is not the host as it was released, or has the contribution already."""


@dataclass(frozen=True)
class Edit:
    """One change of an existing text.

    Args:
        find: what stands there exactly once; what is between two lines, both included, if there are two.
        replace: what is to stand there instead.
    """

    file: str
    find: tuple[str, ...]
    replace: str

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Edit":
        find = given.get("between") or [given["find"]]
        lines = tuple(text.removesuffix("\n") for text in find)
        return cls(given["file"], lines, given["replace"].removesuffix("\n"))

    def applied(self, text: str) -> str:
        """The text after the edit.

        Raises:
            DoesNotFit: if what is to be replaced does not stand there exactly once.
        """
        for part in self.find:
            if text.count(part) != 1:
                raise DoesNotFit(
                    f"{self.file}: expected once, found {text.count(part)} times:\n{part}"
                )
        first, last = text.index(self.find[0]), text.index(self.find[-1])
        return text[:first] + self.replace + text[last + len(self.find[-1]) :]


@dataclass(frozen=True)
class Change:
    """One file as it will be.

    Args:
        kind: ``new``, ``edited``, ``replaced``, or ``left out`` where the tree has no place for it.
    """

    contribution: str
    file: str
    kind: str
    content: bytes = b""


def changes(tree: Path, contribution: str) -> Iterator[Change]:
    """What a contribution makes of a tree.

    Raises:
        DoesNotFit: if an edit finds something else than what it is for.
    """
    place = HERE / contribution
    edits = yaml.safe_load((place / "edits.yaml").read_text())
    replaced = edits["replaces"] if isinstance(edits, dict) else []
    edits = edits["edits"] if isinstance(edits, dict) else edits
    for source in sorted((place / "files").rglob("*")):
        if not source.is_file() or "__pycache__" in source.parts:
            continue
        file = source.relative_to(place / "files").as_posix()
        exists = placed(tree, file).exists()
        if exists and file not in replaced:
            raise DoesNotFit(f"{file} is there already")
        kind = "replaced" if exists else "new"
        yield Change(contribution, file, kind, source.read_bytes())
    texts: dict[str, str] = {}
    for edit in map(Edit.of, edits):
        path = placed(tree, edit.file)
        if not path.exists() and edit.file.startswith(NOT_SHIPPED):
            yield Change(contribution, edit.file, "left out")
            continue
        text = texts[edit.file] if edit.file in texts else path.read_text()
        texts[edit.file] = edit.applied(text)
    for file, text in texts.items():
        yield Change(contribution, file, "edited", text.encode())


def placed(tree: Path, file: str) -> Path:
    """Where a file of a checkout stands in a tree."""
    first, _, rest = file.partition("/")
    if first in SHIPPED_AS and not (tree / first).exists():
        return tree / SHIPPED_AS[first] / rest
    return tree / file


def apply(tree: Path, contributions: Sequence[str] = CONTRIBUTIONS) -> list[Change]:
    """Apply contributions, in the order given.

    Returns:
        what was done, one entry per file.

    Raises:
        DoesNotFit: nothing of the contribution at fault is written then.
    """
    done: dict[tuple[str, str], Change] = {}
    for contribution in contributions:
        found = list(changes(tree, contribution))
        for change in found:
            done[contribution, change.file] = change
            if change.kind != "left out":
                path = placed(tree, change.file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(change.content)
                if change.file.endswith(".sh"):
                    path.chmod(0o755)
    return list(done.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tree", type=Path, help="a checkout, or an unpacked sdist")
    parser.add_argument("contributions", nargs="*", default=CONTRIBUTIONS)
    given = parser.parse_args()
    try:
        for change in apply(given.tree, given.contributions):
            print(f"{change.contribution:22} {change.kind:9} {change.file}")
    except DoesNotFit as error:
        sys.exit(f"does not fit {given.tree}: {error}")


if __name__ == "__main__":
    main()
