"""What a user finds without reading the source."""

import configparser
import re
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from click.testing import CliRunner
from helpers import REPOSITORY
from packaging.requirements import Requirement
from packaging.version import Version

import fusion_bench_didi
from fusion_bench_didi.cli import didi
from fusion_bench_didi.method.didi import DiDiMerging


def test_public_names_are_listed_and_there():
    names = dir(fusion_bench_didi)
    assert {"DiDiMerging", "DiDiModel", "Budget", "load", "merge"} <= set(names)
    for name in names:
        found = getattr(fusion_bench_didi, name)
        assert getattr(found, "__name__", name) == name  # help() says the same name


def test_types_are_for_others_too():
    assert (Path(fusion_bench_didi.__file__).parent / "py.typed").is_file()


def test_closed_sets_of_values_are_literals():
    hints = get_type_hints(DiDiMerging.__init__)
    for name in ("shared", "residual", "allocation", "refinement", "factor_dtype"):
        default = getattr(DiDiMerging(), name)
        assert default in get_args(hints[name])


def test_the_version_is_written_in_one_place():
    """And what has to repeat it repeats it."""
    version = fusion_bench_didi.__version__
    settings = (REPOSITORY / "setup.cfg").read_text()
    assert "version = attr: fusion_bench_didi.__version__" in settings
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+?),? ", changes, re.MULTILINE)[1] == version
    assert CliRunner().invoke(didi, ["--version"]).output.split()[-1] == version


def test_hooks_and_linters_are_of_one_version():
    """What formats before a commit is what `make lint` accepts."""
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    found = {hook["id"]: repo["rev"] for repo in hooks["repos"] for hook in repo["hooks"]}  # fmt: skip
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    lines = settings["options.extras_require"]["test"].splitlines()
    wanted = {r.name: r.specifier for r in map(Requirement, (l for l in lines if l and l[0] != "#"))}  # fmt: skip
    assert set(found) == {"black", "isort"}
    assert all(version in wanted[name] for name, version in found.items())


def test_the_oldest_releases_that_are_allowed_are_those_that_are_tried():
    """`make test-oldest` runs under the lower bounds of what users install."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    extras = settings["options.extras_require"]
    parts = settings["options"]["install_requires"], extras["merge"], extras["serve"]

    def versions(lines: list[str], operator: str) -> dict[str, Version]:
        asked = (Requirement(line) for line in lines if line and line[0] != "#")
        return {r.name: Version(s.version) for r in asked for s in r.specifier if s.operator == operator}  # fmt: skip

    bounds = versions("\n".join(parts).splitlines(), ">=")
    tried = versions((REPOSITORY / "tests/oldest.txt").read_text().splitlines(), "==")
    assert {name: tried.get(name) for name in bounds} == bounds


def test_the_workflow_runs_what_contributors_run():
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/tests.yml").read_text())["jobs"]  # fmt: skip
    run = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]  # fmt: skip
    targets = re.findall(
        r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE
    )
    assert {"make test", "make test-oldest", "make site"} == set(run)
    assert {command.split()[1] for command in run} <= set(targets)
    for form in (REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())


def test_the_root_is_read_at_a_glance():
    """What is new has a room; the root is no place for it."""
    files = sorted(p.name for p in Path(fusion_bench_didi.__file__).parent.glob("*.py"))
    assert len(files) <= 5, files
