"""Merged models that are edited, beside models that are merged anew: a task more, and a smaller budget.

    python -m benchmarks.editing                        # ../shared/suite/real8
    python -m benchmarks.editing --suite text           # MiniLM; models and texts as of benchmarks.text_suite

Every task in turn is left out of a merge and added afterwards, at the bytes of a merge of all. A merge of a large budget is
rescaled to small ones, in a chain and at once. Writes docs/editing_<suite>.json, and docs/editing.md of all there are.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.suites import NOTES, Suite, in_words, machine, mean, write_json
from fusion_bench_didi.demo.text_pools import FolderTextModelPool, FolderTextTaskPool
from fusion_bench_didi.editing import add_task, rescale
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models import DiDiModel

BUDGETS = (0.12, 0.24)
CHAIN = (0.5, 0.24, 0.12)
DOCS = Path("docs")


class TextSuite(Suite):
    """MiniLM on text tasks.

    Args:
        root, data: folders of the models and of the texts.
    """

    def __init__(self, root: str, data: str, *, split: str = "test"):
        from fusion_bench_didi.programs.scoring import Scorer

        self.label = "text"
        self.modelpool = FolderTextModelPool(root=root, data=data)
        options = {"max_length": 64, "batch_size": 128, "limit": 500}
        pool = FolderTextTaskPool(root=root, data=data, split=split, **options)
        self.taskpool, self.scorer = pool, Scorer(pool)


def merged(suite: Suite, tasks: list[str], budget: float) -> tuple[DiDiModel, float]:
    """A merge of some tasks of a suite, and its seconds."""
    pool = suite.modelpool
    start = time.perf_counter()
    everything, kept = pool._models, {"_pretrained_", *tasks}
    pool._models = type(everything)({k: everything[k] for k in everything if k in kept})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = DiDiMerging(budget=budget).run(pool)
    finally:
        pool._models = everything
    return model, time.perf_counter() - start


def kept(scores: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Mean over the tasks scored of accuracy over fine-tuned accuracy, per cent."""
    return 100 * mean({t: s / reference[t] for t, s in scores.items()})


def tasks_added(suite: Suite, reference: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every task left out and added, at the bytes of a merge of all."""
    rows, tasks = [], suite.tasks
    for budget in BUDGETS:
        whole, seconds = merged(suite, tasks, budget)
        at_once = suite.accuracy(whole)
        for task in tasks:
            others = [t for t in tasks if t != task]
            share = budget / len(tasks)
            model, _ = merged(suite, others, budget - share)
            left = budget - model.storage.x_excl
            entry = suite.modelpool._models[task]
            found = add_task(model, entry, task, budget=left)
            scores = suite.accuracy(model)
            row = {
                "budget": budget,
                "task": task,
                "x_excl": model.storage.x_excl,
                "new": kept({task: scores[task]}, reference),
                "new, merged": kept({task: at_once[task]}, reference),
                "all": kept(scores, reference),
                "all, merged": kept(at_once, reference),
                "error": found.facts["relative_error"],
                "seconds": found.facts["seconds"],
                "seconds, merged": seconds,
                "forms": _counted(found.facts["forms"]),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def budgets_lowered(
    suite: Suite, reference: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A large model rescaled in a chain and at once, beside merges."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        places, first = Path(scratch), CHAIN[0]
        for budget in CHAIN:
            model, seconds = merged(suite, suite.tasks, budget)
            model.save_pretrained(places / f"merged {budget}")
            read = sum(_weights(Path(p)) for p in _directories(suite))
            rows.append(_row("merged", budget, model, seconds, read, suite, reference))
        for label, pairs in (
            ("rescaled in a chain", list(zip(CHAIN, CHAIN[1:]))),
            ("rescaled at once", [(first, CHAIN[-1])]),
        ):
            for before, budget in pairs:
                source = places / f"{label} {before}"
                if not source.exists():
                    source = places / f"merged {before}"
                target, start = places / f"{label} {budget}", time.perf_counter()
                rescale(source, budget=budget, output_dir=target)
                seconds = time.perf_counter() - start
                backbone = suite.modelpool.load_pretrained_model()
                model = DiDiModel.from_pretrained(target, backbone)
                name = f"{label}, from {before}"
                row = _row(
                    name, budget, model, seconds, _weights(source), suite, reference
                )
                rows.append(row)
    return rows


def _row(
    label: str,
    budget: float,
    model: DiDiModel,
    seconds: float,
    read: int,
    suite: Suite,
    reference: Mapping[str, float],
) -> dict[str, Any]:
    scores = suite.accuracy(model)
    row = {
        "setting": label,
        "budget": budget,
        "x_excl": model.storage.x_excl,
        "retention": kept(scores, reference),
        "seconds": seconds,
        "read": read,
        "accuracy": scores,
    }
    print(row, flush=True)
    return row


def _counted(forms: Mapping[str, str]) -> dict[str, int]:
    names = list(forms.values())
    return {name: names.count(name) for name in sorted(set(names))}


def _directories(suite: Suite) -> list[str]:
    """Of the base model and the fine-tuned ones."""
    entries = suite.modelpool._models.values()
    return [
        e if isinstance(e, str) else e["pretrained_model_name_or_path"] for e in entries
    ]


def _weights(directory: Path) -> int:
    """Bytes of the weights in a directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def page() -> str:
    """docs/editing.md: what can be done, and what was measured on every suite that was."""
    lines = [(NOTES / "editing.md").read_text().rstrip()]
    for file in sorted(DOCS.glob("editing_*.json")):
        found = json.loads(file.read_text())
        option = "" if found["suite"] == "real8" else f" --suite {found['suite']}"
        lines += [
            "",
            f"## Measured: {found['suite']}, {found['split']} split",
            "",
            f"`python -m benchmarks.editing{option}` ({in_words(found['machine'])}). Retention: accuracy over fine-tuned accuracy, per "
            "cent, mean over tasks.",
            "",
            "A task added to a merge of the others, beside a merge of all tasks at the same bytes; means over every task left out "
            "in turn:",
            "",
            "| budget | the new task: added | merged | all tasks: added | merged | seconds: added | merged |",
            "|---|---|---|---|---|---|---|",
        ]
        keys = ("new", "new, merged", "all", "all, merged")
        for budget in sorted({row["budget"] for row in found["added"]}):
            rows = [row for row in found["added"] if row["budget"] == budget]
            means = [sum(row[key] for row in rows) / len(rows) for key in keys]
            cells = [f"{value:.1f}" for value in means]
            for key in ("seconds", "seconds, merged"):
                cells.append(f"{sum(row[key] for row in rows) / len(rows):.1f}")
            lines.append(f"| {budget} | {' | '.join(cells)} |")
        lines += [
            "",
            "A smaller budget from what is stored, beside merges at that budget:",
            "",
            "| | budget | stored | retention | seconds | MB read |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['setting']} | {row['budget']} | {row['x_excl']:.4f} | {row['retention']:.2f} | {row['seconds']:.1f} | "
            f"{row['read'] / 1e6:.1f} |"
            for row in sorted(found["rescaled"], key=lambda row: -row["budget"])
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", help="a directory, demo, or text")
    parser.add_argument("--split", default="test")
    parser.add_argument("--models", default="outputs/text/models", help="of text")
    parser.add_argument("--data", default="../shared/suite/text/data", help="of text")
    parser.add_argument("--page-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.page_only:
        if arguments.suite == "text":
            suite = TextSuite(arguments.models, arguments.data, split=arguments.split)
        else:
            suite = Suite(arguments.suite, split=arguments.split)
        reference = suite.individuals()
        found = {
            "suite": Path(suite.label).name,
            "split": arguments.split,
            "machine": machine(),
            "individuals": reference,
            "rescaled": budgets_lowered(suite, reference),
            "added": tasks_added(suite, reference),
        }
        write_json(DOCS / f"editing_{Path(suite.label).name}.json", found)
    (DOCS / "editing.md").write_text(page())


if __name__ == "__main__":
    main()
