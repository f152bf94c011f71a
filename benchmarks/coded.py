"""What entropy codes and gain are worth: the default, without gain, and without codes, on validation.

    python -m benchmarks.coded                # real8, and text where its models are
    python -m benchmarks.coded real8

Writes docs/coded.json and docs/coded.md.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.frontier import TITLES, pools
from benchmarks.suites import DEFAULT, in_words, machine, retention, write_json
from fusion_bench_didi.merging.forms import choice
from fusion_bench_didi.method.didi import DiDiMerging

FILE, PAGE = Path("docs") / "coded.json", Path("docs") / "coded.md"
BUDGETS = {
    "real8": (0.03, 0.06, 0.1, 0.12, 0.24, 0.36),
    "text": (0.01, 0.02, 0.03, 0.06),
}
#: Settings, and whether coded experts compete.
WAYS = {
    "fixed widths": ({}, False),
    "coded": ({"gain": "none"}, True),
    "coded, with gain": ({}, True),
}


@contextmanager
def competing(coded: bool) -> Iterator[None]:
    """Coded experts among the stored forms, or not."""
    forms = choice.FORMS
    choice.FORMS = tuple(form for form in forms if coded or form.name != "coded")
    try:
        yield
    finally:
        choice.FORMS = forms


def measured(name: str) -> list[dict[str, Any]]:
    modelpool, scorer = pools(name, "validation")
    tasks = modelpool.model_names
    own = {task: scorer.score(modelpool.load_model(task), task) for task in tasks}
    rows = []
    for budget in BUDGETS[name]:
        for way, (settings, coded) in WAYS.items():
            with competing(coded):
                model = DiDiMerging(budget=budget, **settings).run(modelpool)
            scores = {task: scorer.score(model, task) for task in tasks}
            rows.append(
                {
                    "budget": budget,
                    "way": way,
                    "x": model.storage.x_excl,
                    "error": model.info["relative_error"],
                    "retention": 100 * retention(scores, own),
                }
            )
            print(name, rows[-1], flush=True)
    return rows


def page(found: dict[str, Any]) -> str:
    lines = [
        "# What codes and gain are worth",
        "",
        f"`python -m benchmarks.coded`; {in_words(found['machine'])}. Retention on *validation* in per cent, and the part of the energy "
        "that is lost, which",
        "gain makes larger. *Fixed widths*: experts in 2 to 8 bits or whole, as before there were codes.",
    ]
    for name, rows in found["suites"].items():
        at = {(row["budget"], row["way"]): row for row in rows}
        ways = " | ".join(f"{way} | lost" for way in WAYS)
        lines += ["", f"## {TITLES[name]}", "", f"| budget | {ways} |"]
        lines.append("|--:|" + "--:|" * 2 * len(WAYS))
        for budget in dict.fromkeys(row["budget"] for row in rows):
            cells = [
                f"{row['retention']:.1f} | {row['error']:.3f}"
                for row in (at[budget, way] for way in WAYS)
            ]
            lines.append(f"| {budget} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", choices=[[], *BUDGETS])
    arguments = parser.parse_args()
    found = json.loads(FILE.read_text()) if FILE.exists() else {"suites": {}}
    there = {"real8": DEFAULT.is_dir(), "text": Path("outputs/text/models").is_dir()}
    for name in arguments.suites or [name for name in BUDGETS if there[name]]:
        found["suites"][name] = measured(name)
        found["machine"] = machine()
        write_json(FILE, found)
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
