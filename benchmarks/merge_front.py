"""MERGE's search against random search with the same budget, and where other methods lie relative to its front.

    OMP_NUM_THREADS=1 python -m benchmarks.merge_front [--suite PATH | demo] [--evaluations 300] [--seeds 0 1 2]

Everything is chosen on validation images; the three picks of the first seed and the other methods are measured once on
test images. Both searches of a seed start from the same first population. Figures (docs/merge_front.json), page and plots
are written after every seed, and anew from the figures with ``--pages``; a run that was cut short, or is asked for more
evaluations, is continued from its state in ``--state``.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from fusion_bench.method import SimpleAverageAlgorithm
from matplotlib.figure import Figure
from pymoo.indicators.hv import HV
from torch import nn

from benchmarks.suites import machine, write_json
from fusion_bench_didi.demo.folder_pools import (
    FolderCLIPVisionModelPool,
    FolderCLIPVisionModelTaskPool,
)
from fusion_bench_didi.method.baselines.emr import EMRMerging
from fusion_bench_didi.method.baselines.tsv_c import TSVCompression
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.pools.opening import load_backbone, open_pool
from fusion_bench_didi.programs.scoring import Scorer
from fusion_bench_didi.recombination.components import ComponentReader, components
from fusion_bench_didi.recombination.evolution import SearchSettings
from fusion_bench_didi.recombination.front import (
    draw_front,
    named_picks,
    pareto_front,
)
from fusion_bench_didi.recombination.library import Library
from fusion_bench_didi.recombination.model import RecombinedModel
from fusion_bench_didi.recombination.objectives import Evaluation, Evaluator, Space
from fusion_bench_didi.recombination.search import (
    Evaluate,
    Progress,
    first_population,
    nsga2,
)
from fusion_bench_didi.recombination.validation import scorer_from_pools
from fusion_bench_didi.report.style import color, look, new_figure, save_figure, title
from fusion_bench_didi.task_vectors.scan import scan

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT.parent / "shared" / "suite" / "real8"
OPERATORS = (
    "average",
    "task_arithmetic",
    "ties",
    "didi@0.03",
    "didi@0.06",
    "didi@0.12",
)
NEAR = {"performance": 0.9, "storage": 1.0}
MARKS = (20, 40, 60, 80, 100, 150, 200, 250, 300)
METHODS = {
    "DiDi 0.24": lambda: DiDiMerging(budget=0.24),
    "DiDi 0.5": lambda: DiDiMerging(budget=0.5),
    "DiDi-S": lambda: DiDiMerging(budget=1.24),
    "DiDi-M": lambda: DiDiMerging(budget=1.4),
    "TSV-C": TSVCompression,
    "EMR": EMRMerging,
}


Record = dict[str, Any]
Models = Callable[[str], nn.Module]


class Bench:
    """One suite, opened once; both searches share modules and scores that they have in common."""

    def __init__(self, root: Path, samples: int | None):
        self.root = root
        self.pool = FolderCLIPVisionModelPool(root=str(root))
        # the pool lends its heads and processor; its images are never read here
        heads = FolderCLIPVisionModelTaskPool(root=str(root), split="validation")
        self.backbone = load_backbone(self.pool)
        vectors = open_pool(self.pool, self.backbone)
        vectors = vectors.ordered(sorted(vectors.tasks))
        parts = components(vectors, scan(vectors).changed)
        reader = ComponentReader(vectors)
        self.space = Space.of(parts, reader, OPERATORS)
        self.scorer = scorer_from_pools(
            self.pool, heads, self.backbone, vectors, samples=samples
        )
        self.library = Library(reader)
        self.evaluate = Evaluator(self.space, self.library, self.scorer)

    def others(self) -> dict[str, tuple[float, Models]]:
        """Storage of every other method and how it makes the plain model of a task."""
        made: dict[str, tuple[float, Models]] = {}
        for name, method in METHODS.items():
            model = method().run(self.pool)
            made[name] = model.storage.x_excl, model.materialize
        average = SimpleAverageAlgorithm().run(self.pool)
        made["average"] = 1.0, lambda task: average
        return made

    def performance(self, models: Models) -> float:
        """Of another method's plain models on the images of the search."""
        scores = []
        for task in self.space.tasks:
            accuracy = self.scorer.accuracy(task, dict(models(task).named_parameters()))
            scores.append(accuracy / self.scorer.individual[task])
        return float(np.mean(scores))

    def model(self, found: Evaluation) -> RecombinedModel:
        chains = self.space.chains(np.array(found.genome), self.library)
        return RecombinedModel(
            load_backbone(self.pool),
            {m.id: m for chain in chains.values() for m in chain},
            {task: [m.id for m in chain] for task, chain in chains.items()},
            unit_bits=self.space.unit_bits,
        )


def random_search(
    space: Space, evaluate: Evaluate, settings: SearchSettings, progress: Progress
) -> list[Evaluation]:
    """What the search has to beat: the same first decisions, then random ones of the same distribution."""
    rng = np.random.default_rng([settings.seed, 0])
    found = []
    for genome in first_population(space, settings.evaluations, rng):
        found.append(evaluate(genome))
        progress(len(found), settings.evaluations)
    return found


def hypervolume(
    evaluations: Sequence[Evaluation], *, storage: float, performance: float = 0.0
) -> float:
    """Share of the rectangle ``performance..1 x 0..storage`` that is dominated."""
    costs = np.array([e.costs for e in evaluations])
    scale = np.array([1 - performance, storage])
    costs = np.clip(costs / scale, 0, 1)  # above the individuals counts as equal
    return float(HV(ref_point=np.ones(2))(costs))


def hypervolume_trace(evaluations: Sequence[Evaluation], **box: float) -> list[float]:
    """Hypervolume after each evaluation."""
    counts = range(1, len(evaluations) + 1)
    return [hypervolume(evaluations[:count], **box) for count in counts]


def cached_random(bench: Bench, settings: SearchSettings, file: Path) -> list:
    """Random search with what an earlier or shorter run has evaluated."""
    kept = json.loads(file.read_text()) if file.is_file() else []
    known = {json.dumps(e["genome"]): Evaluation(**e) for e in kept}

    def evaluate(genome):
        key = json.dumps(genome.tolist())
        if key not in known:
            known[key] = bench.evaluate(genome)
        return known[key]

    def progress(done, total):
        tell(done, total)
        if done % 20 == 0 or done == total:
            write_json(file, [e.as_dict() for e in known.values()])

    return random_search(bench.space, evaluate, settings, progress)


def tell(done: int, total: int) -> None:
    if done % 20 == 0 or done == total:
        print(f"  {done}/{total} {time.strftime('%H:%M:%S')}", flush=True)


def on_test(bench: Bench, methods: dict[str, Models]) -> dict:
    """Test accuracy per task, by the host's own task pool."""
    taskpool = FolderCLIPVisionModelTaskPool(
        root=str(bench.root),
        split="test",
        decode_once=True,
        dataloader_kwargs={"batch_size": 64},
    )
    scorer = Scorer(taskpool)
    return {
        name: {task: scorer.score(models(task), task) for task in bench.space.tasks}
        for name, models in methods.items()
    }


def draw_hypervolume(traces: dict[str, list], suite: str) -> Figure:
    """Means over seeds, with their ranges; the search first."""
    with look():
        figure = new_figure(6.4, 3.6)
        axes = figure.subplots()
        for (name, runs), kind in zip(traces.items(), ("ours", "static")):
            length = min(map(len, runs))
            table = np.array([run[:length] for run in runs])
            x = np.arange(1, length + 1)
            axes.plot(x, table.mean(0), color=color(kind), label=name)
            axes.fill_between(
                x, table.min(0), table.max(0), color=color(kind), alpha=0.2, lw=0
            )
        searched, random = ([run[-1] for run in runs] for runs in traces.values())
        wins = sum(a > b for a, b in zip(searched, random))
        title(axes, f"{suite}: more than random finds on {wins} of {len(searched)} seeds")  # fmt: skip
        axes.set_xlabel("evaluations")
        axes.set_ylabel("dominated share of the corner,\nmean and range over seeds")
        axes.legend(loc="lower right")
        figure.tight_layout()
    return figure


def relation(front: list[Evaluation], storage: float, performance: float) -> str:
    """Where a method lies: against the best of the front that stores no more."""
    reach = [e.performance for e in front if e.storage <= storage]
    if not reach:
        return "smaller than every point"
    gap = 100 * (max(reach) - performance)
    side = "below" if gap >= 0 else "above"
    return f"{abs(gap):.1f} points {side} the front"


def page(record: Record) -> str:
    """docs/merge_front.md."""
    runs, settings, tasks = evaluations(record), record["settings"], record["tasks"]
    seeds = list(runs["random"])
    lines = [
        "# MERGE: search and front",
        "",
        f"`OMP_NUM_THREADS=1 python -m benchmarks.merge_front --evaluations {settings['evaluations']} --samples {settings['samples']}"
        f" --seeds {' '.join(map(str, seeds))}` on `{record['suite']}`: {len(tasks)} tasks,"
        f" {record['components']} components, operators {', '.join(OPERATORS)}.",
        "",
        "Performance is accuracy on validation images over that of the task's fine-tuned model, mean over tasks;"
        f" {settings['samples']} images per task, a seeded draw, the same for every method. Storage is `x_excl`: distinct modules"
        " only, in fine-tuned models. Small images and small samples: a point of performance is a handful of images, and"
        " values above 100 % are noise and regularisation, no more.",
        "",
        *_volumes(runs, settings, len(tasks) / 4),
        "",
        "![hypervolume](img/merge_hypervolume.png)",
        "",
        f"## Front of seed {seeds[0]} and other methods",
        "",
        *_front(next(iter(runs["nsga2"].values())), record["others"]),
        "",
        "![front](img/merge_front.png)",
    ]
    if tests := record["tests"]:
        lines += ["", *_on_test(tests, tasks)]
    return "\n".join(lines) + "\n"


def _volumes(
    runs: dict[str, dict[int, list[Evaluation]]], settings: Record, storage: float
) -> list[str]:
    """What each search dominates, by how much it has tried."""
    volumes = {
        kind: [
            {
                mark: (
                    hypervolume(found[:mark], storage=storage),
                    hypervolume(found[:mark], **NEAR),
                )
                for mark in (*MARKS, len(found))
            }
            for found in runs[kind].values()
        ]
        for kind in runs
    }
    seeds, end = list(runs["random"]), settings["evaluations"]
    lines = [
        "## Hypervolume against evaluations",
        "",
        f"Share that is dominated, mean over seeds {seeds}, range in brackets: of the whole box, performance 0..1 x storage"
        f" 0..{storage:g} (no merging, 8 bits), and of the corner where the front lies, performance 0.9..1 x storage 0..1."
        f" Both start from the same first {settings['population']} decisions, which hold every operator with all tasks together"
        " and with each for itself: these alone dominate most of the whole box.",
        "",
        "| evaluations | whole box: NSGA-II with forest | random | corner: NSGA-II with forest | random |",
        "|---|---|---|---|---|",
    ]
    for mark in sorted({m for m in (*MARKS, end) if m <= end}):
        row = [str(mark)]
        for box in (0, 1):
            for kind in ("nsga2", "random"):
                v = [run[mark][box] for run in volumes[kind]]
                row.append(f"{np.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})")
        lines.append(f"| {' | '.join(row)} |")
    ends = {kind: [v[end][0] for v in volumes[kind]] for kind in volumes}
    wins = sum(a > b for a, b in zip(ends["nsga2"], ends["random"]))
    return [*lines, "", f"The search beats random on {wins} of {len(seeds)} seeds."]


def _front(found: list[Evaluation], others: list) -> list[str]:
    """The named picks of a search, and where other methods lie beside its front."""
    front = [found[i] for i in pareto_front(found)]
    lines = [
        "| | x_excl | performance, % | relative to the front |",
        "|---|---|---|---|",
    ]
    for pick, i in named_picks(front).items():
        e = front[i]
        lines.append(
            f"| MERGE {pick} | {e.storage:.3f} | {100 * e.performance:.1f} | on it |"
        )
    for name, x, performance in others:
        where = relation(front, x, performance)
        lines.append(f"| {name} | {x:.3f} | {100 * performance:.1f} | {where} |")
    return lines


def _on_test(tests: dict[str, dict[str, float]], tasks: list[str]) -> list[str]:
    lines = [
        "## Test accuracy, measured once",
        "",
        "Nothing was chosen on these images. The front above was, on the images that it is drawn with, so its lead over"
        " methods that were not is flattered; the distances here are the fair ones.",
        "",
        "| | " + " | ".join([*tasks, "mean"]) + " |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for name, row in tests.items():
        values = [*row.values(), float(np.mean(list(row.values())))]
        cells = " | ".join(f"{100 * v:.1f}" for v in values)
        lines.append(f"| {name} | {cells} |")
    return lines


def evaluations(record: Record) -> dict[str, dict[int, list[Evaluation]]]:
    """Kind of search -> seed -> what it tried, without the decisions."""
    return {
        kind: {
            int(seed): [Evaluation([], p, x, {}) for x, p in found]
            for seed, found in seeds.items()
        }
        for kind, seeds in record["runs"].items()
    }


def pictures(record: Record) -> dict[str, Figure]:
    """By file name."""
    runs = evaluations(record)
    names = {"nsga2": "NSGA-II with forest", "random": "random"}
    traces = {
        name: [hypervolume_trace(f, **NEAR) for f in runs[kind].values()]
        for kind, name in names.items()
    }
    first = next(iter(runs["nsga2"].values()))
    return {
        "merge_hypervolume": draw_hypervolume(traces, record["suite"]),
        "merge_front": draw_front(
            first, others=record["others"], suite=record["suite"]
        ),
    }


def write_page(record: Record, docs: Path) -> None:
    """Figures, page and pictures."""
    (docs / "img").mkdir(parents=True, exist_ok=True)
    write_json(docs / "merge_front.json", record)
    for name, picture in pictures(record).items():
        save_figure(picture, docs / "img" / f"{name}.png")
    (docs / "merge_front.md").write_text(page(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", help="path, or demo; real8 beside the repository")
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--samples", type=int, default=64, help="images per task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--state", type=Path, default=ROOT / "outputs" / "merge_front")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--pages", action="store_true", help="search nothing")
    args = parser.parse_args()
    if args.pages:
        write_page(json.loads((args.docs / "merge_front.json").read_text()), args.docs)
        return
    torch.set_num_threads(1)
    if args.suite == "demo":
        from fusion_bench_didi.demo.suite import build_suite

        args.suite = build_suite()
    bench = Bench(Path(args.suite or DEFAULT), args.samples)
    args.state.mkdir(parents=True, exist_ok=True)
    others, tests = None, None
    runs: dict[str, dict[int, list]] = {"nsga2": {}, "random": {}}
    for seed in args.seeds:
        settings = SearchSettings(
            population=args.population, evaluations=args.evaluations, seed=seed
        )
        print(f"seed {seed}", flush=True)
        runs["nsga2"][seed] = nsga2(
            bench.space,
            bench.evaluate,
            settings,
            state=args.state / f"nsga2_{bench.root.name}_{seed}.json",
            described={"samples": args.samples, "operators": OPERATORS},
            progress=tell,
        )
        kept = args.state / f"random_{bench.root.name}_{args.samples}_{seed}.json"
        runs["random"][seed] = cached_random(bench, settings, kept)
        found = runs["nsga2"][args.seeds[0]]
        if others is None:
            made = bench.others()
            others = [(n, x, bench.performance(m)) for n, (x, m) in made.items()]
            front = [found[i] for i in pareto_front(found)]
            picks = {
                f"MERGE {k}": bench.model(front[i]).materialize
                for k, i in named_picks(front).items()
            }
            measured = {"individuals": bench.pool.load_model, **picks}
            measured |= {name: models for name, (_, models) in made.items()}
            tests = on_test(bench, measured)
        record = {
            "machine": machine(),
            "suite": bench.root.name,
            "settings": {
                key: getattr(args, key)
                for key in ("evaluations", "population", "samples")
            },
            "tasks": list(bench.space.tasks),
            "components": len(bench.space.components),
            "others": others,
            "tests": tests,
            "runs": {
                kind: {
                    str(seed): [[e.storage, e.performance] for e in found]
                    for seed, found in seeds.items()
                }
                for kind, seeds in runs.items()
            },
        }
        write_page(record, args.docs)


if __name__ == "__main__":
    main()
