"""DiDi-Merging over budgets, allocations and refinements, beside base, average and individuals.

    python -m benchmarks.real_suite                     # ../shared/suite/real8
    python -m benchmarks.real_suite --suite demo        # the embedded suite

Factors are float32 as in the paper unless a row says otherwise; ``default`` is the shipped configuration, ``paper`` the
paper's. Prints a table, writes it to docs/real_suite_<suite>.md and all numbers to .json beside it.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

from fusion_bench.method import SimpleAverageAlgorithm
from matplotlib.figure import Figure

from benchmarks.suites import Suite, machine, mean, retention, write_json
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.report.findings import KEPT
from fusion_bench_didi.report.style import look, new_figure, save_figure, title

BUDGETS = (0.24, 0.5, 1.0, 1.24, 1.4, 2.0)
SMALLEST = (0.08, 0.12, 0.16, 0.2, 0.3, 0.36, 0.42)  # few bits only: where 99 % is lost
ALLOCATIONS = ("uniform", "greedy", "learned")
REFINEMENTS = ("none", "adam", "alternating")
#: What an allocation needs: uniform ranks do not choose a shared one; from the greedy ranks there is nothing to learn.
ALONE = {
    "uniform": {"residual": "full", "shared": "mean"},
    "learned": {"warm_start": False},
}
PLAIN = {"factor_dtype": "float32"}
MEAN = {"shared": "mean"}
PAPER = {
    "residual": "full",
    **MEAN,
    "allocation": "learned",
    "warm_start": False,
    "refinement": "adam",
    "normalization": "none",
    **PLAIN,
}


def configurations() -> list[tuple[str, dict]]:
    """Label and settings of every row."""
    rows: list[tuple[str, dict]] = []
    for budget in sorted({*SMALLEST, *BUDGETS}):
        at = {"budget": budget}
        rows.append(("default", at))
        rows.append(("default, no subspaces", {**at, **MEAN}))
    for budget in BUDGETS:
        at = {"budget": budget}
        for dtype in ("int8", "int4", "int3"):
            rows.append((f"default, {dtype}", {**at, "factor_dtype": dtype}))
        rows.append(("paper", {**at, **PAPER}))
        for allocation, refinement in itertools.product(ALLOCATIONS, REFINEMENTS):
            chosen = {"allocation": allocation, "refinement": refinement}
            chosen |= ALONE.get(allocation, {})
            rows.append((f"{allocation}, {refinement}", {**at, **chosen, **PLAIN}))
        for objective in ("none", "matrix"):
            chosen = {"allocation": "greedy", "normalization": objective}
            rows.append((f"greedy, objective {objective}", {**at, **chosen, **PLAIN}))
        only = {"shared": "none", **PLAIN}
        rows.append(("experts only, uniform", {**at, **only, "allocation": "uniform"}))
        rows.append(("experts only, greedy", {**at, **only}))
        rows.append(("no subspaces, greedy", {**at, **MEAN, **PLAIN}))
        rows.append(("subspaces only", {**at, "shared": "subspaces", **PLAIN}))
        full = {"residual": "full", "allocation": "greedy", **MEAN, **PLAIN}
        rows.append(("full residual, greedy", {**at, **full}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", help="a directory, or demo")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument(
        "--only",
        nargs="+",
        help="rows whose labels contain one of these; the others stay as they are",
    )
    arguments = parser.parse_args()
    suite = Suite(arguments.suite, split=arguments.split)
    reference = suite.individuals()
    file = arguments.out / f"real_suite_{suite.label.replace('/', '_')}.json"
    rows, found = [], {}
    if arguments.only:
        found = {row["setting"]: row for row in json.loads(file.read_text())["rows"]}

    def add(label: str, scores: dict, x: float, error: float | None, seconds: float):
        row = {
            "setting": label,
            "x_excl": x,
            "error": error,
            "average": mean(scores),
            "retention": retention(scores, reference),
            "seconds": seconds,
            "accuracy": scores,
        }
        rows.append(row)
        print(_line(row), flush=True)

    add("base model", suite.accuracy(suite.modelpool.load_pretrained_model()), 0, 1, 0)
    start = time.perf_counter()
    average = SimpleAverageAlgorithm().run(suite.modelpool)
    seconds = time.perf_counter() - start
    add("average", suite.accuracy(average), 1, None, seconds)
    add("individuals", reference, len(reference), 0, 0)
    for label, settings in configurations():
        name = f"{settings['budget']}: {label}"
        asked = any(part in label for part in arguments.only or ())
        if name in found and not asked:
            rows.append(found[name])
            continue
        start = time.perf_counter()
        model = DiDiMerging(**settings).run(suite.modelpool)
        seconds = time.perf_counter() - start
        error = model.info["relative_error"]
        scores = suite.accuracy(model)
        add(name, scores, model.storage.x_excl, error, seconds)
    write_json(file, {"machine": machine(), "rows": rows})
    file.with_suffix(".md").write_text(_page(suite, rows, arguments))
    (arguments.out / "img").mkdir(exist_ok=True)
    save_figure(
        draw(rows, Path(suite.label).name), arguments.out / "img" / f"{file.stem}.png"
    )
    print(f"written: {file}, a page beside it, and a plot in img/")


#: Settings to tell apart: color, marker, and what they are called.
SHOWN = {
    "default": ("#d55e00", "o", "default (bits chosen)"),
    "default, int8": ("#56B4E9", "s", "8 bits"),
    "learned, alternating": ("#009E73", "^", "float32"),
    "no subspaces, greedy": ("#CC79A7", "P", "float32, no common subspaces"),
    "experts only, uniform": ("#E69F00", "v", "float32, experts only, uniform ranks"),
    "paper": ("#0072b2", "D", "paper's configuration"),
}


def draw(rows: list[dict], suite: str) -> Figure:
    """Retention against storage, one line per setting, the ones to tell apart in color."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        _, _, label = row["setting"].partition(": ")
        if label:
            point = (row["x_excl"], 100 * row["retention"])
            lines.setdefault(label, []).append(point)
    with look():
        figure = new_figure(7.5, 4.8)
        axes = figure.subplots()
        for label, points in lines.items():
            shade, marker, text = SHOWN.get(label, ("#bbbbbb", ".", None))
            axes.plot(
                *zip(*sorted(points)),
                marker=marker,
                color=shade,
                label=text,
                zorder=3 if text else 2,
            )
        axes.plot([], [], color="#bbbbbb", marker=".", label="other settings")
        axes.axhline(100, color="#222222", lw=0.8, ls=(0, (4, 3)))
        title(axes, f"{suite}: {_finding(lines)}")
        axes.set_xlabel("stored beyond the backbone, in fine-tuned models")
        axes.set_ylabel("retention, % of fine-tuned accuracy")
        axes.legend(loc="lower right")
        figure.tight_layout()
    return figure


def _finding(lines: dict[str, list[tuple[float, float]]]) -> str:
    """Where the default keeps what the fine-tuned models can, and what float32 keeps at most."""
    kept = min((x for x, kept in lines["default"] if kept >= 100 * KEPT), default=None)
    x, most = max(lines["learned, alternating"], key=lambda point: point[1])
    bits = "no budget" if kept is None else f"{kept:.2f} models"
    return f"{100 * KEPT:.0f} % kept in {bits}, by float32 {most:.1f} % in {x:.2f}"


def _line(row: dict) -> str:
    error = "" if row["error"] is None else f"{row['error']:.3f}"
    scores = " | ".join(f"{100 * s:.1f}" for s in row["accuracy"].values())
    return (
        f"| {row['setting']} | {row['x_excl']:.3f} | {error} | {100 * row['average']:.1f} | "
        f"{100 * row['retention']:.1f} | {row['seconds']:.1f} | {scores} |"
    )


def _page(suite: Suite, rows: list[dict], arguments: argparse.Namespace) -> str:
    option = f" --suite {arguments.suite}" if arguments.suite else ""
    head = ["setting", "x_excl", "error", "average", "retention", "seconds"]
    head += suite.tasks
    lines = [
        f"# DiDi-Merging on {suite.label}, {arguments.split} split",
        "",
        f"`python -m benchmarks.real_suite{option}`",
        "",
        "x_excl: stored beyond the backbone, in fine-tuned models. error: energy of the task vectors kept out. retention:",
        "mean over tasks of accuracy / fine-tuned accuracy, per cent. `default` stores codes, 2, 3, 4, 8 bits or float32, chosen per matrix; other rows are float32 unless they say otherwise.",
        "One set of models and one run: differences under half a point are noise.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    return "\n".join([*lines, *map(_line, rows), ""])


if __name__ == "__main__":
    main()
