"""Commands for figures are run before a release only: names that have moved are found here."""

import importlib

import pytest
from helpers import REPOSITORY

MODULES = sorted(path.stem for path in (REPOSITORY / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_of_the_benchmarks_finds_what_it_imports(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    importlib.import_module(f"benchmarks.{name}")
