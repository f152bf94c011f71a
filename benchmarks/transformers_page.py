"""What runs under the transformers of this environment: our tests, room by room, and the host's modules.

    make test-transformers5                              # in an environment of its own with the newest release 5
    python -m benchmarks.transformers_page tests/models  # some rooms, in this environment
    python -m benchmarks.transformers_page --failed      # what failed last time
    python -m benchmarks.transformers_page --page        # the page anew from docs/transformers.json

Writes docs/transformers.{json,md}; rooms that are not run again keep what was found with the same version. Ends with status 1
if a test fails. Tests that are marked slow, and those of the installation itself, are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path("docs")
DATA = DOCS / "transformers.json"
NOTES = Path(__file__).with_name("notes") / "transformers.md"
LEFT_OUT = ("--ignore", "tests/test_install.py", "-m", "not slow")
#: Imports every module of the host, and prints why those that ask transformers for what it does not have do not import.
HOST = """
import importlib, json, pkgutil, sys
import fusion_bench, fusion_bench_didi
lacking = {}
for found in pkgutil.walk_packages(fusion_bench.__path__, "fusion_bench.", onerror=lambda name: None):
    if ".scripts" in found.name or ".compat" in found.name:
        continue
    try:
        importlib.import_module(found.name)
    except Exception as error:
        if "transformers" in str(error):
            lacking[found.name] = str(error).partition(" (/")[0]
print(json.dumps(lacking))
"""


def run(paths: Sequence[str]) -> dict:
    """Outcomes by room, what failed, and what of the host does not import."""
    rooms: dict[str, Counter] = {}
    failed = []
    for room, outcome, name in tested(paths):
        rooms.setdefault(room, Counter())[outcome] += 1
        if outcome == "failed":
            failed.append(name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HOST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lacking = json.loads(done.stdout.splitlines()[-1])
    return {"rooms": rooms, "failed": sorted(failed), "host": lacking}


def tested(paths: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Room, outcome and name of every test that was run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *LEFT_OUT,
            f"--junitxml={file}",
        ]
        command += os.environ.get("PYTEST_ARGS", "").split()
        subprocess.run([*command, *paths], env={**os.environ, "OMP_NUM_THREADS": "1"})
        for case in ElementTree.parse(file).iter("testcase"):
            _, *room, module = case.get("classname").split(".")
            bad = case.find("failure") is not None or case.find("error") is not None
            left = case.find("skipped") is not None
            outcome = "failed" if bad else "skipped" if left else "passed"
            name = f"{'/'.join((*room, module))}.py::{case.get('name')}"
            yield "/".join(room) or "(top)", outcome, name


def merged(before: dict, now: dict) -> dict:
    """Rooms that were not run again as they were, with what failed there."""
    kept = {r: c for r, c in before.get("rooms", {}).items() if r not in now["rooms"]}
    rest = [
        n for n in before.get("failed", ()) if (n.rpartition("/")[0] or "(top)") in kept
    ]
    rooms = dict(sorted({**kept, **now["rooms"]}.items()))
    return {
        "rooms": rooms,
        "failed": sorted([*rest, *now["failed"]]),
        "host": now["host"],
    }


def again(before: dict) -> dict:
    """What failed is run once more; tests that are no longer there leave the counts of their rooms."""
    names = before["failed"]
    files = sorted({f"tests/{name.partition('::')[0]}" for name in names})
    listing = [sys.executable, "-m", "pytest", "-q", "--collect-only", *files]
    there = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
    ids = [f"tests/{name}" for name in names if f"tests/{name}" in there]
    outcomes = {name: outcome for _, outcome, name in tested(ids)} if ids else {}
    rooms = {room: Counter(counts) for room, counts in before["rooms"].items()}
    for name in names:
        room = rooms[name.rpartition("::")[0].rpartition("/")[0] or "(top)"]
        room["failed"] -= 1
        if name in outcomes:
            room[outcomes[name]] += 1
    failed = sorted(name for name, how in outcomes.items() if how == "failed")
    return {**before, "rooms": rooms, "failed": failed}


def page(found: dict) -> str:
    """The notes with the tables in them."""
    outcomes = ("passed", "skipped", "failed")
    lines = ["| tests of | " + " | ".join(outcomes) + " |", "|---|--:|--:|--:|"]
    for room, counts in found["rooms"].items():
        lines.append(
            f"| {room} | {' | '.join(str(counts.get(o, 0)) for o in outcomes)} |"
        )
    totals = {o: sum(c.get(o, 0) for c in found["rooms"].values()) for o in outcomes}
    lines.append(f"| all | {' | '.join(map(str, totals.values()))} |")
    failed = "\n".join(f"- `{name}`" for name in found["failed"]) or "None."
    host = "\n".join(f"| `{m}` | {e} |" for m, e in found["host"].items())
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    return NOTES.read_text().format(
        versions=versions,
        table="\n".join(lines),
        failed=failed,
        host=host,
        passed=totals["passed"],
        skipped=totals["skipped"],
        failed_count=totals["failed"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", default=["tests"])
    parser.add_argument("--failed", action="store_true", help="only what failed")
    parser.add_argument("--page", action="store_true", help="only the page")
    given = parser.parse_args()
    found = json.loads(DATA.read_text()) if DATA.exists() else {}
    if not given.page:
        packages = ("transformers", "fusion-bench", "torch", "huggingface_hub", "peft")
        versions = {name: version(name) for name in packages}
        same = found.get("versions", {}).get("transformers") == versions["transformers"]
        before = found if same else {}
        if given.failed and same:
            found = again(before)
        else:
            found = {"versions": versions, **merged(before, run(given.paths))}
        DATA.write_text(json.dumps(found, indent=1) + "\n")
    (DOCS / "transformers.md").write_text(page(found))
    sys.exit(int(bool(found["failed"])))


if __name__ == "__main__":
    main()
