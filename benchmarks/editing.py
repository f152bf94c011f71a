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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_bench.modelpool import BaseModelPool

from benchmarks.suites import NOTES, Suite, in_words, machine, mean, write_json
from fusion_bench_didi.demo.text_pools import FolderTextModelPool, FolderTextTaskPool
from fusion_bench_didi.editing import AdapterLibrary, add_task, rescale
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models import DiDiModel

BUDGETS = (0.12, 0.24)
CHAIN = (0.5, 0.24, 0.12)
DOCS = Path("docs")
#: Of the table of added tasks.
COLUMNS = [
    (f"{heading}{way}", f"{key}{'' if way == 'added' else f', {way}'}")
    for what, key in (("the new task", "new"), ("all tasks", "all"), ("lost", "lost"))
    for way in ("added", "refit", "merged")
    for heading in [f"{what}: " if way == "added" else ""]
]
PARTS = ("rescaled", "added", "seconds", "library")


class TextSuite(Suite):
    """MiniLM on text tasks.

    Args:
        root, data: folders of the models and of the texts.
        texts: to score on, per task.
    """

    def __init__(self, root: str, data: str, *, split: str = "test", texts: int = 500):
        from fusion_bench_didi.programs.scoring import Scorer

        self.label = "text"
        self.modelpool = FolderTextModelPool(root=root, data=data)
        options = {"max_length": 64, "batch_size": 100, "limit": texts}
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


def refit(suite: Suite, model: DiDiModel, task: str, budget: float) -> DiDiModel:
    """A merge of what a model stores and of one checkpoint more: the shared part is made anew, and all tasks coded again."""
    old = {t: model.materialize(t) for t in model.tasks}
    base = suite.modelpool.load_pretrained_model()
    found = {"_pretrained_": base, **old, task: suite.modelpool.load_model(task)}
    with contextlib.redirect_stdout(io.StringIO()):
        return DiDiMerging(budget=budget).run(BaseModelPool(found))


def error(suite: Suite, model: DiDiModel) -> float:
    """Mean over tasks of the squared distance to the checkpoint over that of the base model."""
    base, found = suite.modelpool.load_pretrained_model().state_dict(), {}
    for task in model.tasks:
        tuned = suite.modelpool.load_model(task).state_dict()
        own = model.materialize(task).state_dict()
        names = [n for n, value in base.items() if value.shape == tuned[n].shape]
        lost, whole = (
            sum(
                float((x[n].double() - tuned[n].double()).square().sum()) for n in names
            )
            for x in (own, base)
        )
        found[task] = lost / whole
    return mean(found)


def tasks_added(
    suite: Suite,
    reference: Mapping[str, float],
    budgets: Sequence[float] = BUDGETS,
    count: int | None = None,
) -> list[dict[str, Any]]:
    """Tasks left out and added, one at a time, at the bytes of a merge of all.

    Args:
        count: so many tasks, all if None.
    """
    rows, tasks = [], suite.tasks
    for budget in budgets:
        whole, seconds = merged(suite, tasks, budget)
        at_once, least = suite.accuracy(whole), error(suite, whole)
        for task in tasks[:count]:
            others = [t for t in tasks if t != task]
            share = budget / len(tasks)
            model, _ = merged(suite, others, budget - share)
            left = budget - model.storage.x_excl
            anew = refit(suite, model, task, budget)
            again = suite.accuracy(anew)
            entry = suite.modelpool._models[task]
            found = add_task(model, entry, task, budget=left)
            scores = suite.accuracy(model)
            row = {
                "budget": budget,
                "task": task,
                "x_excl": model.storage.x_excl,
                "new": kept({task: scores[task]}, reference),
                "new, refit": kept({task: again[task]}, reference),
                "new, merged": kept({task: at_once[task]}, reference),
                "all": kept(scores, reference),
                "all, refit": kept(again, reference),
                "all, merged": kept(at_once, reference),
                "lost": error(suite, model),
                "lost, refit": error(suite, anew),
                "lost, merged": least,
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


def seconds_of_all(suite: Suite) -> dict[str, float]:
    """Processor seconds of merges and edits, which other work on the machine does not change."""
    found: dict[str, float] = {}

    def timed(label: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        value = call()
        found[label] = time.process_time() - start
        return value

    *others, task = suite.tasks
    merged(suite, others, CHAIN[0])  # what is done once per process
    entry = suite.modelpool._models[task]
    for budget in CHAIN:
        timed(f"merged {budget}", lambda: merged(suite, suite.tasks, budget))
    for budget in BUDGETS:
        share = budget / len(suite.tasks)
        model, _ = merged(suite, others, budget - share)
        timed(f"added {budget}", lambda: add_task(model, entry, task, budget=share))
    model, _ = merged(suite, suite.tasks, CHAIN[0])
    for before, budget in zip(CHAIN, CHAIN[1:]):
        label = f"rescaled in a chain, from {before} {budget}"
        timed(label, lambda: rescale(model, budget=budget))
    model, _ = merged(suite, suite.tasks, CHAIN[0])
    label = f"rescaled at once, from {CHAIN[0]} {CHAIN[-1]}"
    timed(label, lambda: rescale(model, budget=CHAIN[-1]))
    return found


def library_filled(suite: Suite, adapters: int = 1000) -> dict[str, Any]:
    """A library of so many tasks, which are those of a merge under many names; seconds, and bytes behind one task."""
    model, _ = merged(suite, suite.tasks, BUDGETS[0])
    experts = [dict(e.deltas.items()) for e in model.modulators.values()]
    shared = dict(model.shared.items())
    many = {f"task {i:04}": experts[i % len(experts)] for i in range(adapters)}
    model.hold(shared, many)
    with tempfile.TemporaryDirectory() as scratch:
        library, seconds = AdapterLibrary(Path(scratch) / "library"), {}
        start = time.perf_counter()
        library.add(model)
        seconds["add one"] = (time.perf_counter() - start) / adapters
        start = time.perf_counter()
        names = AdapterLibrary(library.place).tasks
        seconds["list all"] = time.perf_counter() - start
        backbone = suite.modelpool.load_pretrained_model()
        start = time.perf_counter()
        one = library.load(names[-1], backbone)
        seconds["load one"] = time.perf_counter() - start
        size = {
            part: sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
            for part, place in (
                ("one task", library.place / "tasks" / names[-1]),
                ("shared", library.place / "shared"),
                ("all", library.place),
            )
        }
    stored = one.storage
    return {
        "adapters": adapters,
        "seconds": seconds,
        "bytes": size,
        "expert_bytes": stored.expert_bits[names[-1]] // 8,
        "shared_bytes": stored.shared_bits // 8,
    }


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
        "lost": error(suite, model),
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
        option = found.get("options", "")
        lines += [
            "",
            f"## Measured: {found['suite']}, {found['split']} split",
            "",
            f"`python -m benchmarks.editing{option}` ({in_words(found['machine'])}). Retention: accuracy over fine-tuned accuracy, per "
            "cent, mean over tasks; seconds of one processor.",
            "",
            "A task added to a merge of the others, beside what is stored and the task's checkpoint merged together at the same bytes "
            "(*refit*: the shared part is free, and all tasks are coded again), and a merge of all checkpoints. Means over tasks left out "
            "in turn; *lost* is the part of a task vector's energy that is not reproduced, per cent, mean over all tasks:",
            "",
            f"| budget | left out | {' | '.join(label for label, _ in COLUMNS)} | seconds: added | merged |",
            "|---|---|" + "--:|" * (len(COLUMNS) + 2),
        ]
        for budget in sorted({row["budget"] for row in found["added"]}):
            rows = [row for row in found["added"] if row["budget"] == budget]
            cells = []
            for _, key in COLUMNS:
                value = sum(row[key] for row in rows) / len(rows)
                cells.append(f"{100 * value if key.startswith('lost') else value:.1f}")
            for what in ("added", "merged"):
                cells.append(f"{found['seconds'][f'{what} {budget}']:.1f}")
            lines.append(f"| {budget} | {len(rows)} tasks | {' | '.join(cells)} |")
        lines += [
            "",
            "A smaller budget from what is stored, beside merges at that budget:",
            "",
            "| | budget | stored | retention | lost | seconds | MB read |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['setting']} | {row['budget']} | {row['x_excl']:.4f} | {row['retention']:.2f} | {100 * row['lost']:.1f} | {_seconds(found, row):.1f} | "
            f"{row['read'] / 1e6:.1f} |"
            for row in sorted(found["rescaled"], key=lambda row: -row["budget"])
        ]
        lines += ["", *_of_library(found["library"])]
    return "\n".join(lines) + "\n"


def _seconds(found: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    return found["seconds"][f"{row['setting']} {row['budget']}"]


def _of_library(found: Mapping[str, Any]) -> list[str]:
    seconds, size = found["seconds"], found["bytes"]
    return [
        f"A library of {found['adapters']} tasks: {1000 * seconds['add one']:.0f} ms to add one, {1000 * seconds['list all']:.0f} ms to "
        f"list all, {seconds['load one']:.2f} s to load one on a backbone in memory. Loading",
        f"one opens {size['one task'] / 1e6:.3f} MB of its own ({found['expert_bytes'] / 1e6:.3f} MB are its expert) and "
        f"{size['shared'] / 1e6:.3f} MB that its merge shares, of {size['all'] / 1e6:.1f} MB in all.",
    ]


def _options(arguments: argparse.Namespace) -> str:
    """Those of the command that are not the default and change figures."""
    found = f" --suite {arguments.suite}" if arguments.suite else ""
    if tuple(arguments.budgets) != BUDGETS:
        found += f" --budgets {' '.join(map(str, arguments.budgets))}"
    if arguments.texts != 500:
        found += f" --texts {arguments.texts}"
    if arguments.left_out:
        found += f" --left-out {arguments.left_out}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", help="a directory, demo, or text")
    parser.add_argument("--split", default="test")
    parser.add_argument("--models", default="outputs/text/models", help="of text")
    parser.add_argument("--data", default="../shared/suite/text/data", help="of text")
    parser.add_argument("--texts", type=int, default=500, help="per task, of text")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to measure; others stay as they are")  # fmt: skip
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS, help="of all tasks, where one is added")  # fmt: skip
    parser.add_argument("--left-out", type=int, help="so many tasks in turn; all if left out")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.suite == "text":
        options = {"split": arguments.split, "texts": arguments.texts}
        suite: Suite = TextSuite(arguments.models, arguments.data, **options)
    else:
        suite = Suite(arguments.suite, split=arguments.split)
    label = Path(suite.label).name
    file = DOCS / f"editing_{label}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found |= {"suite": label, "split": arguments.split, "machine": machine()}
    found["options"] = _options(arguments)
    if {"added", "rescaled"} & {*arguments.only}:
        reference = found["individuals"] = suite.individuals()
    if "rescaled" in arguments.only:
        found["rescaled"] = budgets_lowered(suite, reference)
    if "added" in arguments.only:
        given = arguments.budgets, arguments.left_out
        found["added"] = tasks_added(suite, reference, *given)
    if "seconds" in arguments.only:
        found["seconds"] = seconds_of_all(suite)
    if "library" in arguments.only:
        found["library"] = library_filled(suite)
    write_json(file, found)
    (DOCS / "editing.md").write_text(page())


if __name__ == "__main__":
    main()
