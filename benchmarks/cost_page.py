"""docs/cost_model.md from docs/cost_model.json, and the measurements that it is held against."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
    for what, key, measured, here, processes in _measurements(docs, rates):
        case = next((c for c in cases if key.items() <= c.items()), None)
        if case is None:
            missing.append(what)
            continue
        kinds = seconds(case["counts"], here, processes)
        rows.append((what, measured, sum(kinds.values()), kinds))
    right = sum(abs(e / m - 1) <= RIGHT for _, m, e, _ in rows)
    lines = [
        "# What a merge costs",
        "",
        f"`python -m benchmarks.cost_model`; {in_words(found['machine'])}.",
        "",
        "Work is counted while a merge runs (`benchmarks/counting.py`: products, eigenproblems, passes over numbers, calls of torch,",
        "coded numbers, bytes), each kind is timed by itself (`benchmarks/cost_rates.py`), and seconds are counts over rates. No rate",
        "is fitted to what is predicted. What is done while a tensor is worked on is divided by the number of processes; what each",
        "does for itself is not.",
        "",
        "| rate, of one thread | |",
        "|---|--:|",
        *(f"| {name} | {value:.3g} |" for name, value in found["rates"].items()),
        "",
        "## Held against measurements",
        "",
        f"Within {100 * RIGHT:.0f} %: {right} of {len(rows)}. Seconds of the processor of the slowest process in rows of",
        "`docs/scaling.json`; of the wall, on two threads and with the rates that were measured then, in rows of `docs/speed.json`.",
        "Each was taken at another time, on a machine whose rates change with what else runs on it: of `docs/scaling.json` those of ViT-B/32 on a",
        "quiet machine, the others and the rates above beside much other work, rows of `docs/speed.json` on a quiet machine, of which products, elementwise operations,",
        "reading and writing were recorded and the rest (calls above all) was not.",
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
        lines += ["", f"Not counted, and so not expected: {_together(missing)}."]
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


def _measurements(
    docs: Path, rates: Rates
) -> Iterator[tuple[str, dict[str, Any], float, Rates, int]]:
    """What was measured: its name, the case, seconds, the rates that it was measured at, processes."""
    scaling = json.loads((docs / "scaling.json").read_text())
    for row in scaling["processes"]:
        key = {k: row[k] for k in ("shape", "tasks", "budget")}
        size = row["processes"]
        many = f"{size} process" + "es" * (size > 1)
        what = f"{row['shape']}, {row['tasks']} tasks, budget {row['budget']}, {many}"
        yield what, key, max(row["cpu"]), rates, size
    for group, rows in scaling["tasks"].items():
        kind, _, budget = group.partition(", budget ")
        shape = {"small models": "small", "adapters": "adapters"}[kind]
        for row in rows:
            key = {"shape": shape, "tasks": row["tasks"], "budget": float(budget)}
            what = f"{kind}, {row['tasks']} tasks, budget {budget}"
            yield what, key, row["merge cpu"], rates, 1
    speed = json.loads((docs / "speed.json").read_text())
    for part in ("peers", "cold", "growth"):
        if speed[part]["device"] == "cpu":
            here = _at(rates, speed[part].get("rates", speed["peers"]["rates"]))
            yield from _speed_rows(part, speed[part], here)


def _speed_rows(
    part: str, found: Mapping[str, Any], here: Rates
) -> Iterator[tuple[str, dict[str, Any], float, Rates, int]]:
    rows = found["rows"]
    if isinstance(rows, Mapping):
        about = {key: found[key] for key in ("shape", "tasks")}
        rows = [{"method": name, **about, **row} for name, row in rows.items()]
    for row in rows:
        if row["method"].startswith("didi"):
            budget = _SPEED.get(row["method"])
            if row["method"] == "didi_per_task" and row["tasks"] != 8:
                budget = None
            key = {k: row[k] for k in ("shape", "tasks")} | {"budget": budget}
            what = f"speed.json {part}: {row['method']}, {row['shape']}, {row['tasks']} tasks"
            yield what, key, row["seconds"], here, 1


def _at(rates: Rates, told: Mapping[str, float]) -> Rates:
    """Rates of two threads, as a record has them; what it has not gets on as its products do. Calls take turns."""
    times = 1e9 * told["GFLOP/s"] / rates.operations
    passes = 1e9 * told["elementwise G/s"] / rates.cache
    return replace(
        rates,
        operations=times * rates.operations,
        eigen=times * rates.eigen,
        cache=passes * rates.cache,
        memory=passes * rates.memory,
        read=1e9 * told["read GB/s"],
        write=1e9 * told["write GB/s"],
        hashed=2 * rates.hashed,
        coded=2 * rates.coded,
    )
