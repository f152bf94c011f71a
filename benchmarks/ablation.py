"""One choice changed at a time, on three re-trainings of the embedded suite.

    python -m benchmarks.ablation
    python -m benchmarks.ablation --keep float32 bits    # rows whose names begin so stay as they are

Mean and spread (largest minus smallest) of the retention over the seeds, on test images; nothing was chosen on them.
"""

import argparse
import json
from pathlib import Path

from benchmarks.suites import Suite, machine, retention, write_json
from fusion_bench_didi.demo.suite import build_suite
from fusion_bench_didi.method.didi import DiDiMerging

BUDGETS = (0.12, 0.25, 0.5, 1.24)
FLOAT = {"factor_dtype": "float32"}
CHOICES: tuple[tuple[str, dict], ...] = (
    ("default", {}),
    ("shared: mean only", {"shared": "mean"}),
    ("shared: none", {"shared": "none"}),
    ("gain: none", {"gain": "none"}),
    ("bits: int8", {"factor_dtype": "int8"}),
    ("bits: int4", {"factor_dtype": "int4"}),
    ("bits: int3", {"factor_dtype": "int3"}),
    ("bits: float32", FLOAT),
    ("float32, objective: plain MSE", {**FLOAT, "normalization": "none"}),
    ("float32, objective: relative", {**FLOAT, "normalization": "matrix"}),
    ("float32, shared: mean only", {**FLOAT, "shared": "mean"}),
    ("float32, shared: subspaces only", {**FLOAT, "shared": "subspaces"}),
    ("float32, shared: none", {**FLOAT, "shared": "none"}),
    ("float32, shared: full residual", {**FLOAT, "residual": "full", "shared": "mean"}),
    ("float32, allocation: greedy", {**FLOAT, "allocation": "greedy"}),
    (
        "float32, allocation: uniform, full residual",
        {**FLOAT, "allocation": "uniform", "residual": "full", "shared": "mean"},
    ),
    ("float32, refinement: none", {**FLOAT, "refinement": "none"}),
)


#: Retentions, one per seed, by label and budget.
Found = dict[tuple[str, float], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument(
        "--keep", nargs="*", default=[], help="beginnings of names of rows that stay"
    )
    arguments = parser.parse_args()
    before = _rows(arguments.out) if arguments.keep else {}
    found: Found = {}
    for seed in arguments.seeds:
        suite = Suite(str(build_suite(seed=seed)))
        reference = suite.individuals()
        base = suite.accuracy(suite.modelpool.load_pretrained_model())
        found.setdefault(("base model", 0.0), []).append(retention(base, reference))
        for budget in BUDGETS:
            for label, settings in CHOICES:
                stays = label.startswith(tuple(arguments.keep))
                if stays and (label, budget) in before:
                    found[label, budget] = before[label, budget]
                    continue
                model = DiDiMerging(budget=budget, **settings).run(suite.modelpool)
                kept = retention(suite.accuracy(model), reference)
                found.setdefault((label, budget), []).append(kept)
                print(seed, budget, label, f"{100 * kept:.2f}", flush=True)
    write_page(found, arguments.seeds, arguments.out)


def _rows(out: Path) -> Found:
    """What is in ablation.json."""
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    return {(label, budget): values for label, budget, values in rows}


def write_page(found: Found, seeds: list[int], out: Path) -> None:
    """ablation.md and .json."""
    labels = list(dict.fromkeys(label for label, _ in found if label != "base model"))
    lines = [
        "# Ablation on the embedded suite",
        "",
        f"`python -m benchmarks.ablation`: {len(seeds)} re-trainings (seeds {seeds}), retention in per cent,",
        "mean and, in brackets, largest minus smallest. Each row changes the default in what it names. The base model",
        f"keeps {_cell(found['base model', 0.0])}.",
        "",
        "| setting | " + " | ".join(f"budget {b}" for b in BUDGETS) + " |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    for label in labels:
        cells = " | ".join(_cell(found[label, b]) for b in BUDGETS)
        lines.append(f"| {label} | {cells} |")
    print("\n".join(lines))
    (out / "ablation.md").write_text("\n".join(lines) + "\n")
    rows = [[label, budget, values] for (label, budget), values in found.items()]
    write_json(out / "ablation.json", {"machine": machine(), "rows": rows})


def _cell(values: list[float]) -> str:
    spread = max(values) - min(values)
    return f"{100 * sum(values) / len(values):.1f} ({100 * spread:.1f})"


if __name__ == "__main__":
    main()
