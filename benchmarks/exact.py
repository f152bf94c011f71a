"""Whether the fast path costs accuracy: real8 merged by the range finder, and with every matrix decomposed exactly.

    python -m benchmarks.exact                 # docs/exact.md and .json

The towers of real8 are below the side from which the range finder is used: here it is forced from 16 on. The exact path
decomposes every matrix in full, also those that are known to be stored whole. Nothing is chosen by it.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from fusion_bench_didi.lowrank import svd
from fusion_bench_didi.method import DiDiMerging

from .suites import Suite, machine, mean, write_json

BUDGETS = (0.24, 0.5, 1.24, 1.4)
DTYPES = ("auto", "checkpoint")
#: Side from which the range finder is used, and samples instead of decompositions.
FORCED, NEVER = 16, sys.maxsize


@contextlib.contextmanager
def path(exact: bool) -> Iterator[None]:
    """Merges in here go one way."""
    side = svd.SKETCH_SIDE
    svd.SKETCH_SIDE = NEVER if exact else FORCED
    try:
        yield
    finally:
        svd.SKETCH_SIDE = side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default=None)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    suite = Suite(arguments.suite, split=arguments.split)
    rows = []
    for dtype in DTYPES:
        for budget in BUDGETS:
            row: dict = {"budget": budget, "factor_dtype": dtype}
            for label in ("fast", "exact"):
                with path(label == "exact"):
                    method = DiDiMerging(budget=budget, factor_dtype=dtype)
                    model = method.run(suite.modelpool)
                row[label] = {
                    "accuracy": mean(suite.accuracy(model)),
                    "relative_error": model.info["relative_error"],
                }
            rows.append(row)
            print(row, flush=True)
    lines = [
        "# The fast path against exact decompositions",
        "",
        f"`python -m benchmarks.exact`, {suite.label}, {arguments.split} images, average accuracy in %. Fast: the range "
        "finder, forced from",
        f"side {FORCED} on, and nothing decomposed that is known to be stored whole. Exact: every matrix decomposed in full.",
        "",
        "| factor_dtype | budget | fast | exact | difference | error, fast | error, exact |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        fast, exact = row["fast"], row["exact"]
        a, b = 100 * fast["accuracy"], 100 * exact["accuracy"]
        lines.append(
            f"| {row['factor_dtype']} | {row['budget']} | {a:.2f} | {b:.2f} | {a - b:+.2f} | "
            f"{fast['relative_error']:.5f} | {exact['relative_error']:.5f} |"
        )
    (arguments.out / "exact.md").write_text("\n".join(lines) + "\n")
    write_json(arguments.out / "exact.json", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
