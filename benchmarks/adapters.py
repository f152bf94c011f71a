"""Adapters of a bounded rank: allocated for from the start, or cut from a packed merge afterwards; docs/adapters.{json,md}.

    python -m benchmarks.adapters           # real8, and the text suite where benchmarks.text_suite left it
    python -m benchmarks.adapters real8     # one of them; rows that are there are not measured again
    python -m benchmarks.adapters text --models DIR --data DIR --limit 500

Rows are budgets. A *packed* merge is what is stored by default, with bits and forms of all kinds; *cut* are LoRA adapters of
rank R in bfloat16 made from it; *bounded* is a merge with ``max_rank=R``, and its adapters. Norms, biases and embeddings
are left at the base model's in all of them, as adapters carry none.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fusion_bench import BaseModelPool

from benchmarks.suites import DEFAULT, Suite, write_json
from fusion_bench_didi.deltas.plain import LowRankDelta
from fusion_bench_didi.demo.text_pools import FolderTextModelPool, FolderTextTaskPool
from fusion_bench_didi.export.factors import fitted
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.programs.scoring import Scorer

BUDGETS = {"real8": (0.06, 0.12, 0.24), "text": (0.02, 0.06)}
RANKS = (8, 32)
EXCLUDE = ["*embeddings*"]


def merged(pool: BaseModelPool, budget: float, **choice: Any) -> DiDiModel:
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


def row(model: DiDiModel, scorer: Scorer) -> dict[str, float]:
    """Size and accuracy."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        accuracies = [scorer.score(model, task) for task in model.tasks]
    return {
        "megabytes": model.storage.excl_bits / 8e6,
        "accuracy": 100 * sum(accuracies) / len(accuracies),
    }


def measure(
    pool: BaseModelPool, scorer: Scorer, budget: float, rank: int, packed: DiDiModel
) -> dict[str, Any]:
    """One row: a budget, and the rank that adapters may have."""
    bounded = merged(pool, budget, max_rank=rank)
    return {
        "budget": budget,
        "rank": rank,
        "packed": row(packed, scorer),
        "cut": row(as_adapters(packed, rank), scorer),
        "bounded": row(bounded, scorer),
        "bounded as adapters": row(as_adapters(bounded, rank), scorer),
    }


def table(rows: list[dict[str, Any]]) -> str:
    kinds = ("packed", "bounded", "bounded as adapters", "cut")
    lines = [
        "| budget | R | packed | bounded | bounded, as adapters | cut afterwards |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for r in sorted(rows, key=lambda r: (r["budget"], r["rank"])):
        cells = [f"{r[k]['accuracy']:.1f} ({r[k]['megabytes']:.2f} MB)" for k in kinds]
        lines.append(f"| {r['budget']:g} | {r['rank']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ahead(rows: list[dict[str, Any]]) -> str:
    """What it is worth to allocate for adapters from the start, in words."""
    gaps = [r["bounded as adapters"]["accuracy"] - r["cut"]["accuracy"] for r in rows]
    text = f"Adapters of the merge that was bounded have {min(gaps):+.1f} to {max(gaps):+.1f} points beside those cut afterwards"
    better = sum(gap > 0 for gap in gaps)
    return f"{text}; they are ahead in {better} of {len(gaps)} rows."


def page(record: Mapping[str, Any]) -> str:
    titles = {
        "real8": "real8: eight tasks on images, towers 128 wide",
        "text": f"MiniLM on eight text tasks, {record.get('limit')} texts of the test split per task",
    }
    lines = [
        "# Adapters of a bounded rank",
        "",
        "`python -m benchmarks.adapters`, on the test split. Norms, biases and embeddings stay the base model's in every column, as "
        "adapters for servers carry none. Each cell is accuracy in %, and MB of all eight tasks beyond the base model.",
        "",
        "- *packed*: the default merge, forms and bits of all kinds",
        "- *bounded*: a merge with `max_rank=R` as it is stored; *as adapters*: its LoRA adapters in bfloat16",
        "- *cut*: adapters of rank R in bfloat16, made from the packed merge afterwards",
    ]
    for name, title in titles.items():
        if record.get(name):
            lines += ["", f"## {title}", "", table(record[name]), "", ahead(record[name])]  # fmt: skip
    return "\n".join(lines) + "\n"


def pools(name: str, given: argparse.Namespace) -> tuple[BaseModelPool, Scorer]:
    if name == "real8":
        suite = Suite(None)
        return suite.modelpool, suite.scorer
    where = {"root": given.models, "data": given.data}
    texts = {"max_length": 64, "batch_size": 32, "limit": given.limit}
    return FolderTextModelPool(**where), Scorer(FolderTextTaskPool(**where, **texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", choices=[[], *BUDGETS])
    parser.add_argument("--models", type=Path, default=Path("outputs/text/models"))
    parser.add_argument("--data", type=Path, default=Path("../shared/suite/text/data"))
    parser.add_argument("--limit", type=int, default=200, help="texts per task")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    at = given.out / "adapters.json"
    record = json.loads(at.read_text()) if at.exists() else {}
    there = {"real8": DEFAULT.is_dir(), "text": given.models.is_dir()}
    for name in given.suites or [n for n in BUDGETS if there[n]]:
        rows = record.setdefault(name, [])
        known = {(r["budget"], r["rank"]) for r in rows}
        pool, scorer = pools(name, given)
        if name == "text":
            record["limit"] = given.limit
        for budget in BUDGETS[name]:
            missing = [rank for rank in RANKS if (budget, rank) not in known]
            packed = merged(pool, budget) if missing else None
            for rank in missing:
                rows.append(measure(pool, scorer, budget, rank, packed))
                write_json(at, record)
                print(name, json.dumps(rows[-1]), flush=True)
    (given.out / "adapters.md").write_text(page(record))


if __name__ == "__main__":
    main()
