"""Commands for figures are run before a release only: names that have moved are found here."""

import importlib

import pytest
from helpers import REPOSITORY

from benchmarks import routing

MODULES = sorted(path.stem for path in (REPOSITORY / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_of_the_benchmarks_finds_what_it_imports(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("blocks", [3, 4])
def test_routers_are_asked_for_blocks_that_there_are(blocks):
    for _, options in routing.ROUTERS.values():
        layers = routing.counted(options, blocks).get("layers", [])
        numbers = [layer for layer in layers if isinstance(layer, int)]
        assert numbers in ([], list(range(blocks)))
        assert all(layer == "*embedding" for layer in layers if layer not in numbers)
