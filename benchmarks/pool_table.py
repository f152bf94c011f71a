"""What every model pool of the host can be used for: the cells of tests/pools/test_pool_table.py, as a page.

python -m benchmarks.pool_table            # run the cells, write docs/models.{json,md}
python -m benchmarks.pool_table --page     # the page anew from docs/models.json
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

from benchmarks import figures
from benchmarks.suites import NOTES, write_json

DOCS = Path("docs")
DATA = DOCS / "models.json"


def run() -> dict[str, dict[str, str]]:
    """Outcome by pool and cell."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    sys.path.insert(0, "tests")  # the cells are the tests' own
    from host_pools import HOST_POOLS
    from pool_cells import CELLS, Bench, outcome

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    table: dict[str, dict[str, str]] = {}
    for name, row in HOST_POOLS.items():
        with tempfile.TemporaryDirectory() as place:
            bench = Bench(row, Path(place))
            table[name] = {cell: outcome(bench, cell) for cell in CELLS}
        refused = [cell for cell, found in table[name].items() if found != "yes"]
        print(f"{name}: all but {refused}" if refused else f"{name}: all", flush=True)
    return table


def page(table: dict[str, dict[str, str]]) -> str:
    """The table, with every refusal once below it."""
    cells = list(next(iter(table.values())))
    refusals: list[str] = []
    lines = [f"| pool | {' | '.join(cells)} |", "|---|" + ":-:|" * len(cells)]
    for name, row in table.items():
        marks = []
        for found in row.values():
            if found != "yes" and found not in refusals:
                refusals.append(found)
            yes = found == "yes"
            marks.append("yes" if yes else f"no ({refusals.index(found) + 1})")
        lines.append(f"| {name} | {' | '.join(marks)} |")
    numbered = (f"{i}. {text}" for i, text in enumerate(refusals, 1))
    notes = (NOTES / "models.md").read_text()
    return notes.format(table="\n".join(lines), refusals="\n".join(numbered))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="run nothing")
    if not parser.parse_args().page:
        figures.check_packages(parser, "models")
        write_json(DATA, run())
    (DOCS / "models.md").write_text(page(json.loads(DATA.read_text())))


if __name__ == "__main__":
    main()
