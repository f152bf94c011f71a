"""Whether the fast path costs accuracy: real8 merged as it is, by the range finder, and with every matrix decomposed exactly.

    python -m benchmarks.exact                 # docs/exact.md and .json

The towers of real8 are below the side from which the range finder is used: it is forced from 16 on in one column. The exact
path decomposes every matrix in full, also those that are known to be stored whole. Nothing is chosen by it.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.suites import Suite, machine, mean, write_json
from fusion_bench_didi.lowrank import svd
from fusion_bench_didi.method.didi import DiDiMerging

BUDGETS = (0.24, 0.5, 1.24, 1.4)
DTYPES = ("auto", "checkpoint")
#: Side from which the range finder is used.
SIDES = {"as it is": svd.SKETCH_SIDE, "forced": 16, "exact": sys.maxsize}


@contextlib.contextmanager
def path(label: str) -> Iterator[None]:
    """Merges in here go one way."""
    side = svd.SKETCH_SIDE
    svd.SKETCH_SIDE = SIDES[label]
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
            for label in SIDES:
                with path(label):
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
        f"`python -m benchmarks.exact`, {suite.label}, {arguments.split} images, average accuracy in % and its difference to "
        "exact",
        "decompositions, then relative merge errors. As it is: whatever a merge does by itself; on towers this small, mostly exact",
        f"decompositions. Forced: the range finder from side {SIDES['forced']} on, and nothing decomposed that is known to be "
        "stored whole.",
        "Exact: every matrix decomposed in full.",
        "",
        "| factor_dtype | budget | exact | as it is | forced | error, exact | as it is | forced |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        best = 100 * row["exact"]["accuracy"]
        less = [100 * row[k]["accuracy"] - best for k in ("as it is", "forced")]
        lost = [row[k]["relative_error"] for k in ("exact", "as it is", "forced")]
        lines.append(
            f"| {row['factor_dtype']} | {row['budget']} | {best:.2f} | "
            + " | ".join([f"{x:+.2f}" for x in less] + [f"{x:.5f}" for x in lost])
            + " |"
        )
    (arguments.out / "exact.md").write_text("\n".join(lines) + "\n")
    write_json(arguments.out / "exact.json", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
