"""What entropy codes and gain are worth: the default, without gain, and without codes, on validation.

    python -m benchmarks.coded                # real8, the embedded suite, and text where its models are
    python -m benchmarks.coded real8

Writes docs/coded.json and docs/coded.md.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.frontier import TITLES, pools
from benchmarks.suites import DEFAULT, in_words, machine, retention, write_json
from fusion_bench_didi.demo.suite import build_suite
from fusion_bench_didi.merging.forms import choice, early_decision
from fusion_bench_didi.method.didi import DiDiMerging

FILE, PAGE = Path("docs") / "coded.json", Path("docs") / "coded.md"
BUDGETS = {
    "real8": (0.03, 0.06, 0.1, 0.12, 0.24, 0.36),
    "demo": (0.08, 0.12, 0.2),
    "text": (0.01, 0.015, 0.02, 0.03),
}
#: Training seeds of the embedded suite.
SEEDS = (0, 1, 2)
#: Texts per task.
TEXTS = 250
#: Settings, and whether coded experts compete.
WAYS = {
    "fixed widths": ({}, False),
    "coded": ({"gain": "none"}, True),
    "coded, with gain": ({}, True),
}


@contextmanager
def competing(codes: bool) -> Iterator[None]:
    """Coded experts among the stored forms, or not."""
    before = choice.FORMS, early_decision._codes_compete
    if not codes:
        choice.FORMS = tuple(f for f in choice.FORMS if f.name != "coded")
        early_decision._codes_compete = lambda *_: False
    try:
        yield
    finally:
        choice.FORMS, early_decision._codes_compete = before


def measured(name: str) -> list[dict[str, Any]]:
    """Means over the trainings of a suite."""
    if name != "demo":
        return measured_once(name, BUDGETS[name])
    runs = [measured_once(str(build_suite(seed=seed)), BUDGETS[name]) for seed in SEEDS]
    return [
        {
            **rows[0],
            **{k: mean(row[k] for row in rows) for k in ("x", "error", "retention")},
        }
        for rows in zip(*runs)
    ]


def measured_once(name: str, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Rows of a suite, one per budget and way, measured on its validation images.

    Args:
        name: of a suite, or its directory.
    """
    modelpool, scorer = pools(name, "validation", TEXTS)
    tasks = modelpool.model_names
    own = {task: scorer.score(modelpool.load_model(task), task) for task in tasks}
    rows = []
    for budget in budgets:
        for way, (settings, codes) in WAYS.items():
            with competing(codes):
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
        "gain makes larger. *Fixed widths*: experts in 2 to 8 bits or whole, as before there were codes. *Gain*, the default: every "
        "direction is made as long as rounding found it, in the same bytes.",
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
        means = [mean(r["retention"] for r in rows if r["way"] == way) for way in WAYS]
        lines.append(f"| mean | {' | '.join(f'{kept:.2f} |' for kept in means)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", choices=[[], *BUDGETS])
    arguments = parser.parse_args()
    found = json.loads(FILE.read_text()) if FILE.exists() else {"suites": {}}
    models = Path("outputs/text/models")
    there = {"real8": DEFAULT.is_dir(), "demo": True, "text": models.is_dir()}
    for name in arguments.suites or [name for name in BUDGETS if there[name]]:
        found["suites"][name] = measured(name)
        found["machine"] = machine()
        write_json(FILE, found)
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
