"""docs/cost_model.md from docs/cost_model.json, and the measurements that it is held against."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cost_forecast import forecasts
from benchmarks.cost_rates import Rates, seconds
from benchmarks.suites import in_words

#: A prediction counts as right within this part.
RIGHT = 0.2
#: Methods of docs/speed.json whose merges are counted, with their budgets.
_SPEED = {"didi": 1.4, "didi_disk": 1.4, "didi_per_task": 1.4}
_ROW = "| {what} | {took:.1f} | {expected:.1f} | {ratio:.2f} | {right} |"


def page(found: Mapping[str, Any], docs: Path) -> str:
    rates = Rates(**found["rates"])
    cases = found["cases"]
    rows, missing = [], []
    for what, key, measured, here, processes in _measurements(docs):
        case = next((c for c in cases if key.items() <= c.items()), None)
        if case is None or here is None:
            missing.append(what)
            continue
        kinds = seconds(case["counts"], Rates(**here), processes)
        rows.append((what, measured, sum(kinds.values()), kinds))
    right = sum(abs(e / m - 1) <= RIGHT for _, m, e, _ in rows)
    lines = [
        "# What a merge costs",
        "",
        f"`python -m benchmarks.cost_model`; {in_words(found['machine'])}.",
        "",
        "Work is counted while a merge runs (`benchmarks/counting.py`: products, decompositions and elementwise operations by their",
        "size, calls of torch, coded numbers, bytes), each kind and size is timed by itself (`benchmarks/cost_rates.py`), and seconds",
        "are counts over rates. No rate is fitted to what is predicted. What is done while a tensor is worked on is divided by the",
        "number of processes; what each does for itself is not.",
        "",
        "| rate, of one thread | |",
        "|---|--:|",
        *_rates_in_words(found["rates"]),
        "",
        "## Held against measurements",
        "",
        f"Within {100 * RIGHT:.0f} %: {right} of {len(rows)}. Seconds of the processor of the slowest process in rows of",
        "`docs/scaling.json`, of the wall on two threads in rows of `docs/speed.json`. Each is held against the rates that as many",
        "processes and threads had right beside it, since those of this machine change with what else runs on its host.",
        "",
        "| merge | measured s | expected s | expected over measured | within |",
        "|---|--:|--:|--:|---|",
    ]
    for what, took, expected, _ in rows:
        ratio = expected / took
        lines.append(
            _ROW.format(
                what=what,
                took=took,
                expected=expected,
                ratio=ratio,
                right="yes" if abs(ratio - 1) <= RIGHT else "no",
            )
        )
    if missing:
        lines += [
            "",
            f"Not counted, or without rates of their own, and so not expected: {_together(missing)}.",
        ]
    lines += ["", "Where the expected seconds of one process go:", ""]
    lines += _table_of_kinds([row for row in rows if row[0].endswith(", 1 process")])
    return "\n".join([*lines, "", *forecasts(cases, rates, docs)]) + "\n"


def _together(names: list[str]) -> str:
    """Methods and tasks of one part side by side."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, _, rest = (
            name.partition(": ") if ": " in name else ("scaling.json", "", name)
        )
        groups.setdefault(head, []).append(rest)
    return "; ".join(f"{head} ({', '.join(rest)})" for head, rest in groups.items())


def _table_of_kinds(rows: list[tuple]) -> list[str]:
    if not rows:
        return []
    kinds = list(rows[0][3])
    lines = [f"| merge | {' | '.join(kinds)} |", "|---|" + "--:|" * len(kinds)]
    for what, *_, found in rows:
        lines.append(f"| {what} | {' | '.join(f'{found[k]:.1f}' for k in kinds)} |")
    return lines


def _rates_in_words(rates: Mapping[str, Any]) -> Iterator[str]:
    """Of what gets on by size, the smallest and the largest that were timed."""
    by_kind: dict[str, dict[int, float]] = {}
    for name, value in rates["sized"].items():
        kind, _, size = name.partition(" ")
        by_kind.setdefault(kind, {})[int(size)] = value
    for kind, values in by_kind.items():
        low, high = min(values), max(values)
        yield f"| {kind}, size 4^{low} to 4^{high} | {values[low]:.3g} to {values[high]:.3g} |"  # fmt: skip
    for name, value in rates.items():
        if name != "sized":
            yield f"| {name} | {value:.3g} |"


_Measured = tuple[str, dict[str, Any], float, Mapping[str, Any] | None, int]


def _measurements(docs: Path) -> Iterator[_Measured]:
    """What was measured: its name, the case, seconds, the rates that it was measured at, processes."""
    scaling = json.loads((docs / "scaling.json").read_text())
    for row in scaling["processes"]:
        key = {k: row[k] for k in ("shape", "tasks", "budget")}
        size = row["processes"]
        many = f"{size} process" + "es" * (size > 1)
        what = f"{row['shape']}, {row['tasks']} tasks, budget {row['budget']}, {many}"
        yield what, key, max(row["cpu"]), row.get("rates"), size
    for group, rows in scaling["tasks"].items():
        kind, _, budget = group.partition(", budget ")
        shape = {"small models": "small", "adapters": "adapters"}[kind]
        for row in rows:
            key = {"shape": shape, "tasks": row["tasks"], "budget": float(budget)}
            what = f"{kind}, {row['tasks']} tasks, budget {budget}"
            yield what, key, row["merge cpu"], row.get("rates"), 1
    speed = json.loads((docs / "speed.json").read_text())
    for part in ("peers", "cold", "growth"):
        if speed[part]["device"] == "cpu":
            yield from _speed_rows(part, speed[part])


def _speed_rows(part: str, found: Mapping[str, Any]) -> Iterator[_Measured]:
    rows = found["rows"]
    if isinstance(rows, Mapping):
        about = {key: found[key] for key in ("shape", "tasks")}
        about["rates"] = found.get("cost rates")
        rows = [{"method": name, **about, **row} for name, row in rows.items()]
    for row in rows:
        if row["method"].startswith("didi"):
            budget = _SPEED.get(row["method"])
            if row["method"] == "didi_per_task" and row["tasks"] != 8:
                budget = None
            key = {k: row[k] for k in ("shape", "tasks")} | {"budget": budget}
            what = f"speed.json {part}: {row['method']}, {row['shape']}, {row['tasks']} tasks"
            yield what, key, row["seconds"], row.get("rates"), 1
