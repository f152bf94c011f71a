"""All that was learned on one screen, its figures taken from the other pages' files: docs/what_we_learned.md.

    python -m benchmarks.what_we_learned        # nothing is run; make the other pages first

Text comes from ``benchmarks/notes``, where ``{real8[0.24: default, int3]}`` is the retention of that row.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.suites import NOTES
from benchmarks.wide_page import chosen, stored_for
from fusion_bench_didi.report.comparison import Comparison

DOCS = Path("docs")
ENOUGH = 99.0  # per cent


def page() -> str:
    return (NOTES / "what_we_learned.md").read_text().format(**figures())


def figures() -> dict[str, Any]:
    """What the text may name, in per cent of retention where nothing else is said."""
    real8 = {row["setting"]: 100 * row["retention"] for row in _rows("real_suite_real8")}  # fmt: skip
    demo = {f"{budget}: {what}": 100 * mean(kept) for what, budget, kept in _rows("ablation")}  # fmt: skip
    compared = Comparison.read(DOCS / "comparison_real8.json").good
    kept = {row["method"]: 100 * row["retention"]["mean_of_ratios"] for row in compared}
    refined = [
        real8[f"{budget}: uniform, alternating"] - real8[f"{budget}: uniform, none"]
        for budget in _budgets(real8, "uniform, alternating")
    ]
    ratios = {
        what: [ratio for kind, common, *_, ratio, _, _ in _rows("overlap") if (kind, common) == (what, 0.9)]  # fmt: skip
        for what in ("direction", "spaces")
    }
    return {
        "real8": _printed(real8),
        "demo": _printed(demo),
        "compared": _printed(kept),
        "coded": _coded(),
        "wide": _wide(),
        "x": {row["method"]: f"{row['x_excl']:.2f}" for row in compared},
        "enough": {
            "default": _enough(real8, "default"),
            "float32": _enough(real8, "greedy, alternating"),
            "demo": _enough(demo, "default"),
        },
        "refined": _between(refined, 1),
        "ratio": {what: _between(found, 2) for what, found in ratios.items()},
    }


def _coded() -> dict[str, str]:
    """Of coded experts on validation: what is kept and lost on real8 by budget and way, and means over budgets by suite and way."""
    found: dict[str, str] = {}
    suites = json.loads((DOCS / "coded.json").read_text())["suites"]
    for row in suites["real8"]:
        name = f"{row['budget']}: {row['way']}"
        found[f"{name}: kept"] = f"{row['retention']:.1f}"
        found[f"{name}: lost"] = f"{row['error']:.3f}"
    for suite, rows in suites.items():
        for way in {row["way"] for row in rows}:
            kept = [row["retention"] for row in rows if row["way"] == way]
            found[f"{suite}: {way}"] = f"{sum(kept) / len(kept):.1f}"
    return found


def _wide() -> dict[str, str]:
    """Of towers by width: where 99 % is kept, and what is lost, by the default; what dropping keeps."""
    found = {}
    for width, held in json.loads((DOCS / "wide_towers.json").read_text())["widths"].items():  # fmt: skip
        rows = held["rows"]
        found[f"{width}: enough"] = stored_for(chosen(rows)["DiDi"], ENOUGH)
        found[f"{width}: lost"] = f"{rows['didi[budget=0.06]']['error']:.2f}"
        dropped = [rows[key]["retention"] for key in rows if "dare[drop=0.95" in key]
        found[f"{width}: dropping"] = " and ".join(f"{kept:.1f}" for kept in sorted(dropped))  # fmt: skip
    return found


def _rows(name: str) -> list:
    return json.loads((DOCS / f"{name}.json").read_text())["rows"]


def _printed(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in values.items()}


def _budgets(kept: dict[str, float], setting: str) -> list[str]:
    """The budgets at which a setting was measured, ascending."""
    found = (name.split(": ", 1) for name in kept if ": " in name)
    return sorted((b for b, what in found if what == setting), key=float)


def _enough(kept: dict[str, float], setting: str) -> str:
    """The smallest budget from which on a setting keeps enough."""
    last = None
    for budget in reversed(_budgets(kept, setting)):
        if kept[f"{budget}: {setting}"] < ENOUGH:
            break
        last = budget
    return last or "no budget"


def _between(values: Iterable[float], digits: int) -> str:
    values = sorted(values)
    return f"{values[0]:.{digits}f} to {values[-1]:.{digits}f}"


def main() -> None:
    (DOCS / "what_we_learned.md").write_text(page())


if __name__ == "__main__":
    main()
