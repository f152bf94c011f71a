"""What the default keeps at every budget, against what it kept when the figures of README and docs were made.

    python -m benchmarks.expectations                   # real8, then the embedded suite; exit status 1 if something went down
    python -m benchmarks.expectations --accept          # after a look at the differences: these are what is expected now

Run it after every change that could move accuracy, and before a release. Scores are of *validation* images, so that a
change may be chosen by them. One run of a small suite is noisy (a change of the last bit of a product moves single budgets
by a few tenths of a point); what is lost of the task vectors is not. Hence three bounds: energy lost at every budget, the
mean over the budgets, and a wide one for a single budget.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.suites import DEFAULT, Suite, machine, retention, write_json
from fusion_bench_didi.method.didi import DiDiMerging

FILE = Path("docs") / "expectations.json"
BUDGETS = (0.08, 0.12, 0.16, 0.2, 0.24, 0.3, 0.36, 0.5, 0.7, 1.0, 1.4)

#: Energy that a merge may lose more than expected, as a share of what it lost.
MORE_LOST = 0.005
#: Points of retention that may be lost on the average over budgets, and at a single one.
AVERAGE_POINTS, SINGLE_POINTS = 0.3, 1.2

#: Per budget: error, retention.
Record = Mapping[str, Mapping[str, float]]


def measured(suite: Suite) -> dict[str, dict[str, float]]:
    """Error and retention per budget, of the default settings."""
    reference, found = suite.individuals(), {}
    for budget in BUDGETS:
        model = DiDiMerging(budget=budget).run(suite.modelpool)
        kept = retention(suite.accuracy(model), reference)
        error = model.info["relative_error"]
        found[str(budget)] = {"error": error, "retention": 100 * kept}
        print(f"{suite.label} {budget}: error {error:.4f}, retention {100 * kept:.2f}", flush=True)  # fmt: skip
    return found


def faults(found: Record, expected: Record) -> Iterator[str]:
    """What is worse than expected by more than noise."""
    if set(found) != set(expected):
        yield f"budgets {sorted(found)}, expected {sorted(expected)}"
        return
    lower = {b: expected[b]["retention"] - found[b]["retention"] for b in found}
    for budget, points in lower.items():
        error, was = found[budget]["error"], expected[budget]["error"]
        if error > was * (1 + MORE_LOST):
            yield f"at {budget} {error:.5f} of the energy is lost, expected {was:.5f}"
        if points > SINGLE_POINTS:
            yield f"at {budget} retention is {points:.2f} points lower"
    average = sum(lower.values()) / len(lower)
    if average > AVERAGE_POINTS:
        yield f"retention is {average:.2f} points lower on the average of all budgets"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accept", action="store_true", help="write what was found")
    parser.add_argument("--suite", nargs="*", help="directories, or demo")
    arguments = parser.parse_args()
    names = arguments.suite or [*(["real8"] if DEFAULT.is_dir() else []), "demo"]
    record = json.loads(FILE.read_text()) if FILE.exists() else {"suites": {}}
    failed = False
    for name in names:
        suite = Suite(None if name == "real8" else name, split="validation")
        found = measured(suite)
        if arguments.accept:
            record["suites"][name] = found
            continue
        if name not in record["suites"]:
            print(f"{name}: nothing is expected yet; --accept writes it")
            failed = True
            continue
        worse = list(faults(found, record["suites"][name]))
        print(f"{name}: " + ("\n  ".join(["worse:", *worse]) if worse else "as expected"))  # fmt: skip
        failed |= bool(worse)
    if arguments.accept:
        write_json(FILE, {"machine": machine(), "suites": record["suites"]})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
