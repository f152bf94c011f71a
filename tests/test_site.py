"""The site names every page, and every relative link of README and pages leads somewhere."""

import re
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINKED = [
    *(REPOSITORY / f for f in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "upstream/README.md")),
    *PAGES,
]  # fmt: skip
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def leaves(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [leaf for value in values for leaf in leaves(value)]


def heading_ids(page: Path) -> set[str]:
    """As MkDocs and GitHub make them of plain headings."""
    heads = re.findall(r"^#+ (.+)$", _CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in heads}


def test_nav_names_every_page_once():
    nav = leaves(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", LINKED, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_resolve(page):
    broken = []
    for link in _LINK.findall(_CODE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and (not anchor or anchor in heading_ids(target))
        if DOCS in page.parents and DOCS not in target.parents:
            there = False  # the site ends there
        if not there:
            broken.append(link)
    assert not broken
