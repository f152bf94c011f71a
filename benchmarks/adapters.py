"""Adapters of a bounded rank: allocated for from the start, or cut from a packed merge afterwards; docs/adapters.{json,md}.

    python -m benchmarks.adapters                                    # the text suite, as benchmarks.text_suite leaves it
    python -m benchmarks.adapters --models DIR --data DIR --limit 500

Rows are budgets. A *packed* merge is what is stored by default, with bits and forms of all kinds; *cut* are LoRA adapters of
rank R in bfloat16 made from it; *bounded* is a merge with ``max_rank=R``, and its adapters. Norms, biases and embeddings
are left at the base model's in all of them, as adapters carry none.
"""

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from fusion_bench_didi.deltas.plain import LowRankDelta
from fusion_bench_didi.demo.text_pools import FolderTextModelPool, FolderTextTaskPool
from fusion_bench_didi.export.factors import fitted
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel

BUDGETS, RANKS = (0.02, 0.06), (8, 32)
EXCLUDE = ["*embeddings*"]


def merged(pool: FolderTextModelPool, budget: float, **choice: Any) -> DiDiModel:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        method = DiDiMerging(
            budget=budget, vectors="pretrained", exclude=EXCLUDE, **choice
        )
        return method.run(pool)


@torch.no_grad()
def as_adapters(model: DiDiModel, rank: int) -> DiDiModel:
    """What adapters of a rank in bfloat16 say."""
    experts: dict[str, dict[str, LowRankDelta]] = {}
    for task in model.tasks:
        experts[task] = {}
        expert = model.modulators[task]
        for name in model.touched:
            delta, shared = expert.deltas.get(name), model.shared.get(name)
            if delta is None and shared is None:
                continue
            product = (delta or shared).product(shared if delta else None)
            base = model.base_tensor(name)
            found = fitted(
                model.task_tensor(name, expert) - base,
                product,
                max_rank=rank,
                dtype=torch.bfloat16,
            )
            experts[task][name] = LowRankDelta.of(
                tuple(base.shape), found.factors, torch.bfloat16
            )
    base = model.materialize(model.tasks[0], as_base=model.touched)
    return DiDiModel(base, {}, experts, unit_bits=model.unit_bits)


def row(model: DiDiModel, taskpool: FolderTextTaskPool) -> dict[str, float]:
    """Size and accuracy."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        report = taskpool.evaluate(model)
    accuracies = [report[task]["accuracy"] for task in model.tasks]
    return {
        "megabytes": model.storage.excl_bits / 8e6,
        "accuracy": 100 * sum(accuracies) / len(accuracies),
    }


def measure(models: Path, data: Path, limit: int, at: Path) -> list[dict[str, Any]]:
    """All rows; those that are there already are taken."""
    rows = json.loads(at.read_text()) if at.exists() else []
    there = {(r["budget"], r["rank"]) for r in rows}
    pool = FolderTextModelPool(root=models, data=data)
    taskpool = FolderTextTaskPool(
        root=models, data=data, max_length=64, batch_size=128, limit=limit
    )
    for budget in BUDGETS:
        missing = [rank for rank in RANKS if (budget, rank) not in there]
        if not missing:
            continue
        packed = merged(pool, budget)
        whole = row(packed, taskpool)
        for rank in missing:
            bounded = merged(pool, budget, max_rank=rank)
            rows.append(
                {
                    "budget": budget,
                    "rank": rank,
                    "packed": whole,
                    "cut": row(as_adapters(packed, rank), taskpool),
                    "bounded": row(bounded, taskpool),
                    "bounded as adapters": row(as_adapters(bounded, rank), taskpool),
                }
            )
            at.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    return rows


def page(rows: list[dict[str, Any]], limit: int) -> str:
    kinds = ("packed", "bounded", "bounded as adapters", "cut")
    lines = [
        "# Adapters of a bounded rank",
        "",
        "`python -m benchmarks.adapters`: MiniLM on eight text tasks, "
        f"{limit} texts of the test split per task. Norms, biases and embeddings stay the base model's in every column, as "
        "adapters for servers carry none. Each cell is accuracy in %, and MB of all eight tasks beyond the base model.",
        "",
        "- *packed*: the default merge, forms and bits of all kinds",
        "- *bounded*: a merge with `max_rank=R` as it is stored; *as adapters*: its LoRA adapters in bfloat16",
        "- *cut*: adapters of rank R in bfloat16, made from the packed merge afterwards",
        "",
        "| budget | R | packed | bounded | bounded, as adapters | cut afterwards |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        cells = [f"{r[k]['accuracy']:.1f} ({r[k]['megabytes']:.1f} MB)" for k in kinds]
        lines.append(f"| {r['budget']:g} | {r['rank']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("outputs/text/models"))
    parser.add_argument("--data", type=Path, default=Path("../shared/suite/text/data"))
    parser.add_argument("--limit", type=int, default=200, help="texts per task")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    at = given.out / "adapters.json"
    rows = measure(given.models, given.data, given.limit, at)
    (given.out / "adapters.md").write_text(page(rows, given.limit))


if __name__ == "__main__":
    main()
