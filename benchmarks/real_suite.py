"""DiDi-Merging over budgets, allocations and refinements, beside base, average and individuals.

    python -m benchmarks.real_suite                     # ../shared/suite/real8
    python -m benchmarks.real_suite --suite demo        # the embedded suite

Factors are float32 as in the paper unless a row says otherwise; ``default`` is the shipped configuration, ``paper`` the
paper's. Prints a table, writes it to docs/real_suite_<suite>.md and all numbers to .json beside it.
"""

import argparse
import itertools
import time
from pathlib import Path

from fusion_bench.method import SimpleAverageAlgorithm

from fusion_bench_didi.method import DiDiMerging

from .suites import Suite, machine, mean, retention, write_json

BUDGETS = (0.24, 0.5, 1.0, 1.24, 1.4, 2.0)
ALLOCATIONS = ("uniform", "greedy", "learned")
REFINEMENTS = ("none", "adam", "alternating")
PLAIN = {"factor_dtype": "float32"}
PAPER = {
    "residual": "full",
    "warm_start": False,
    "refinement": "adam",
    "normalisation": "none",
    **PLAIN,
}


def configurations() -> list[tuple[str, dict]]:
    """Label and settings of every row."""
    rows = []
    for budget in BUDGETS:
        at = {"budget": budget}
        rows.append(("default", at))
        for dtype in ("int8", "int4"):
            rows.append((f"default, {dtype}", {**at, "factor_dtype": dtype}))
        rows.append(("paper", {**at, **PAPER}))
        for allocation, refinement in itertools.product(ALLOCATIONS, REFINEMENTS):
            chosen = {"allocation": allocation, "refinement": refinement}
            rows.append((f"{allocation}, {refinement}", {**at, **chosen, **PLAIN}))
        for objective in ("none", "matrix"):
            chosen = {"allocation": "greedy", "normalisation": objective}
            rows.append((f"greedy, objective {objective}", {**at, **chosen, **PLAIN}))
        only = {"shared": "none", **PLAIN}
        rows.append(
            ("experts only, uniform", {**at, **only, "allocation": "uniform"})
        )
        rows.append(("experts only, learned", {**at, **only}))
        full = {"residual": "full", "allocation": "greedy", **PLAIN}
        rows.append(("full residual, greedy", {**at, **full}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", help="a directory, or demo")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--only", help="rows whose label contains this")
    arguments = parser.parse_args()
    suite = Suite(arguments.suite, split=arguments.split)
    reference = suite.individuals()
    rows = []

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
        if arguments.only and arguments.only not in label:
            continue
        start = time.perf_counter()
        model = DiDiMerging(**settings).run(suite.modelpool)
        seconds = time.perf_counter() - start
        error = model.info["relative_error"]
        scores = suite.accuracy(model)
        add(f"{settings['budget']}: {label}", scores, model.storage.x_excl, error, seconds)
    name = f"real_suite_{suite.label.replace('/', '_')}"
    write_json(arguments.out / f"{name}.json", {"machine": machine(), "rows": rows})
    (arguments.out / f"{name}.md").write_text(_page(suite, rows, arguments))
    print(f"written: {arguments.out / name}.md and .json")


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
        "mean over tasks of accuracy / fine-tuned accuracy, per cent. Factors are float32 except in the `default` rows.",
        "One set of models and one run: differences under half a point are noise.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    return "\n".join([*lines, *map(_line, rows), ""])


if __name__ == "__main__":
    main()
