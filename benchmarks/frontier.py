"""Retention against stored bytes: the default at many budgets, and every method of few bits at its own storage.

    python -m benchmarks.frontier                 # real8, text (where its models are) and the embedded suite
    python -m benchmarks.frontier real8           # one of them; what is measured already is not measured again
    python -m benchmarks.frontier --pages         # page and figure from stored figures

The default is measured here, on the test split; figures of the others are those of the comparison pages. Writes
docs/frontier.json, docs/frontier.md and docs/img/frontier.png.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from benchmarks.suites import DEFAULT, NOTES, Suite, machine, retention, write_json
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.programs.scoring import Scorer
from fusion_bench_didi.report.labels import place
from fusion_bench_didi.report.style import color, look, new_figure, save_figure

FILE = Path("docs") / "frontier.json"
PAGE, FIGURE = Path("docs") / "frontier.md", Path("docs") / "img" / "frontier.png"
BUDGETS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.17, 0.24, 0.26, 0.36, 0.5)  # fmt: skip
#: Budgets that are measured along a trellis too.
ALONG = (0.015, 0.03, 0.06, 0.1, 0.17, 0.26)
TICKS = (0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.6)
#: What a curve is read at.
MARKS = (95.0, 97.0, 98.4, 99.0, 99.4)
TITLES = {
    "real8": "real8: towers 128 wide",
    "text": "MiniLM: 384 wide, pre-trained",
    "demo": "embedded suite: towers 64 wide",
}
#: Storage up to which methods are told of.
MOST = 1.0
#: Retention from which on the figure shows it.
LEAST = 88


def pools(
    name: str, split: str = "test", texts: int | None = None
) -> tuple[Any, Scorer]:
    """Model pool, and scorer on a split.

    Args:
        texts: how many of each task; what the suite's YAML says if None.
    """
    if name == "text":
        models, tasks = (
            OmegaConf.load(Path("benchmarks/conf") / kind / "text.yaml")
            for kind in ("modelpool", "taskpool")
        )
        tasks.split = split
        tasks.limit = texts or tasks.limit
        return instantiate(models), Scorer(instantiate(tasks))
    suite = Suite(None if name == "real8" else name, split=split)
    return suite.modelpool, suite.scorer


def measure(name: str, known: dict[str, Any]) -> None:
    """Every budget that is not known yet, into the record of a suite; written after each."""
    modelpool, scorer = pools(name)
    rows = known.setdefault(name, {})
    tasks = modelpool.model_names
    if "individuals" not in rows:
        rows["individuals"] = {
            task: scorer.score(modelpool.load_model(task), task) for task in tasks
        }
    along = rows.setdefault("trellis", {})
    wanted = [(budget, "scalar", rows) for budget in BUDGETS]
    for budget, quantizer, place in wanted + [(b, "trellis", along) for b in ALONG]:
        if str(budget) in place:
            continue
        begin = time.process_time()
        model = DiDiMerging(budget=budget, quantizer=quantizer).run(modelpool)
        seconds = time.process_time() - begin
        scores = {task: scorer.score(model, task) for task in tasks}
        place[str(budget)] = {
            "retention": 100 * retention(scores, rows["individuals"]),
            "x": model.storage.x_excl,
            "error": model.info["relative_error"],
            "cpu_seconds": seconds,
        }
        print(name, budget, quantizer, place[str(budget)], flush=True)
        write_json(FILE, {"machine": machine(), "suites": known})


def curve(rows: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Storage and retention of the default, by storage."""
    found = [v for k, v in rows.items() if k not in ("individuals", "trellis")]
    return sorted((row["x"], row["retention"]) for row in found)


def storage_for(points: Sequence[tuple[float, float]], kept: float) -> float | None:
    """Least storage from which on a curve, linear between its points in the logarithm, keeps so much; None if nowhere."""
    found = None
    for (x0, y0), (x1, y1) in reversed(list(zip(points, points[1:]))):
        if y1 < kept:
            break
        part = 0.0 if y0 >= kept else (kept - y0) / (y1 - y0)
        found = math.exp(math.log(x0) + part * (math.log(x1) - math.log(x0)))
    return found


def retention_at(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Of a curve at some storage; None outside it."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
    return None


def rivals(name: str, most: float = MOST) -> list[tuple[str, float, float]]:
    """Method, storage and retention of every row of the suite's comparison that is told the task and stores less than so much."""
    file = Path("docs") / f"comparison_{name}.json"
    if not file.is_file():
        return []
    return [
        (row["method"], row["x_excl"], 100 * row["retention"]["mean_of_ratios"])
        for row in json.loads(file.read_text())["rows"]
        if row["group"] == "dynamic"
        and row["family"] is None
        and not row["error"]
        and row["routing"] == "oracle"
        and 0 < row["x_excl"] < most
        and not row["key"].startswith("merge")
    ]


def table(name: str, rows: Mapping[str, Any]) -> str:
    """What the default keeps, and what the others keep beside it at their storage."""
    points = curve(rows)
    lines = [
        "| budget | x excl. | retention | energy lost | along a trellis: x excl. | retention | energy lost |",
        "|---|---|---|---|---|---|---|",
    ]
    along = rows.get("trellis", {})
    for budget in sorted(rows.keys() - {"individuals", "trellis"}, key=float):
        cells = [
            f"{row['x']:.4f} | {row['retention']:.1f} | {row['error']:.3f}"
            for row in (rows[budget], along.get(budget))
            if row is not None
        ]
        cells += ["| | "] * (2 - len(cells))
        lines.append(f"| {budget} | {' | '.join(cells)} |")
    lines += ["", "| keeps | stored |", "|---|---|"]
    for mark in MARKS:
        x = storage_for(points, mark)
        lines.append(f"| {mark:g} % | {'–' if x is None else f'{x:.3f}'} |")
    others = rivals(name)
    if others:
        lines += ["", "| method | x excl. | retention | DiDi at that storage |", "|---|---|---|---|"]  # fmt: skip
    for method, x, kept in sorted(others, key=lambda row: row[1]):
        ours = retention_at(points, x)
        lines.append(f"| {method} | {x:.3f} | {kept:.1f} | {'–' if ours is None else f'{ours:.1f}'} |")  # fmt: skip
    return "\n".join(lines)


def draw(suites: Mapping[str, Any]) -> Figure:
    """One panel per suite: logarithm of storage, the last percents."""
    with look():
        figure = new_figure(5.4 * len(suites), 4.6)
        panels = figure.subplots(1, len(suites), squeeze=False)[0]
        for axes, (name, rows) in zip(panels, suites.items()):
            shown = [p for p in curve(rows) if p[1] >= LEAST]
            axes.plot(*zip(*shown), "o-", color=color("ours"), ms=4, lw=2, zorder=3)
            near = [r for r in rivals(name) if r[2] >= LEAST]
            for _, x, kept in near:
                axes.plot(x, kept, "D", color=color("dynamic"), ms=5)
            for row in rows.get("trellis", {}).values():
                if row["retention"] >= LEAST:
                    axes.plot(row["x"], row["retention"], "^", color=color("ours"), ms=7)  # fmt: skip
            axes.set(xscale="log", ylim=(LEAST, 100.9), title=TITLES.get(name, name))
            shown_x = [x for x in TICKS if shown[0][0] / 1.3 < x < 1]
            axes.set_xticks(shown_x, [f"{x:g}" for x in shown_x])
            axes.minorticks_off()
            axes.set_xlabel("stored beyond the backbone, all tasks (fine-tuned models)")
            axes.set_ylabel("retention, % of the individuals")
            axes.axhline(99, color="#777777", lw=0.8, ls=(0, (4, 3)))
        figure.tight_layout()
        for axes, (name, rows) in zip(panels, suites.items()):
            _name(axes, name, [p for p in curve(rows) if p[1] >= LEAST])
    return figure


def _name(axes, name: str, shown: list[tuple[float, float]]) -> None:
    """Labels of our curve, at its middle, and of the other methods."""
    near = [r for r in rivals(name) if r[2] >= LEAST]
    place(
        axes,
        [shown[len(shown) // 2], *((x, kept) for _, x, kept in near)],
        ["DiDi", *(method for method, _, _ in near)],
        [color("ours"), *[color("dynamic")] * len(near)],
        avoid=_along(shown),
        weights=["bold", *["normal"] * len(near)],
    )


def _along(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of a curve, close to one another where the axis is logarithmic."""
    found = []
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        for part in (i / 16 for i in range(17)):
            found.append((x0 * (x1 / x0) ** part, y0 + part * (y1 - y0)))
    return found


def write_page(record: Mapping[str, Any]) -> None:
    suites = {n: record["suites"][n] for n in TITLES if n in record["suites"]}
    save_figure(draw(suites), FIGURE)
    parts = [f"## {TITLES[name]}\n\n{table(name, rows)}" for name, rows in suites.items()]  # fmt: skip
    text = (NOTES / "frontier.md").read_text()
    PAGE.write_text(text.replace("{tables}", "\n\n".join(parts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", choices=[[], *TITLES])
    parser.add_argument("--pages", action="store_true", help="measure nothing")
    parser.add_argument("--anew", action="store_true", help="forget what was measured")
    arguments = parser.parse_args()
    record = json.loads(FILE.read_text()) if FILE.exists() else {"suites": {}}
    there = {"real8": DEFAULT.is_dir(), "text": Path("outputs/text/models").is_dir(), "demo": True}  # fmt: skip
    for name in arguments.suites or [n for n in TITLES if there[n]]:
        if not arguments.pages:
            if arguments.anew:
                record["suites"].pop(name, None)
            measure(name, record["suites"])
    write_page(json.loads(FILE.read_text()))


if __name__ == "__main__":
    main()
