"""Accuracy under each router against the oracle, on a stream of all tasks shuffled, and what routing costs.

    python -m benchmarks.routing            # real8; --suite demo for the embedded default

Everything with a choice is chosen on validation images; the test images are scored once. Writes docs/routing.md (real8) and
benchmarks/results/routing_<suite>.json.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from torch import Tensor, nn

from benchmarks.suites import DEFAULT, machine, write_json
from fusion_bench_didi.demo.folder_pools import FolderCLIPVisionModelPool
from fusion_bench_didi.demo.mixed_pools import MixedFolderTaskPool
from fusion_bench_didi.demo.suite import build_suite
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.method.routed import fit_router_to
from fusion_bench_didi.method.se_merging import SEMerging
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.pools.inputs import load_inputs
from fusion_bench_didi.routers.capture import blocks
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.routers.representation import (
    RepresentationRouter,
    distance,
)

HERE = Path(__file__).resolve().parent
BATCH = 64
IMAGES = 660  # per task, for heads; the smallest training set of real8
FEW = 200  # the same for heads on distances

#: In a list of layers: every block that the backbone has.
BLOCKS = "blocks"
#: routers of DiDi-M: label -> (kind, options)
ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "representation": ("representation", {}),
    "representation, far": ("representation", {"prefer": "far"}),
    "representation + discriminant": (
        "representation",
        {"head": "discriminant", "layers": [BLOCKS]},
    ),
    "projection": ("projection", {}),
    "projection, all blocks": ("projection", {"layers": ["*embedding", BLOCKS]}),
    "projection + discriminant": ("projection", {"head": "discriminant"}),
    "projection + mlp": ("projection", {"head": "mlp"}),
    "projection + mlp, 32 directions": (
        "projection",
        {"head": "mlp", "directions": 32},
    ),
    "projection + mlp, 64 directions": (
        "projection",
        {"head": "mlp", "directions": 64},
    ),
    "projection + mlp, 32 directions, soft": (
        "projection",
        {"head": "mlp", "directions": 32, "hard": False, "temperature": 0.5},
    ),
    "mlp": ("mlp", {}),
    "mlp, all blocks": ("mlp", {"layers": [BLOCKS]}),
}
#: what is tried for SE-Merging on validation images
GRID = {
    "layers": [[-1], [BLOCKS]],
    "distance": ["l2", "cosine"],
    "prefer": ["near", "far"],
    "temperature": [0.1, 0.3, 1.0, None],  # None: hard
}
CHOOSING = 100  # validation images per task for the grid


class Stream:
    """One split as a mixed stream, its images in memory."""

    def __init__(self, root: Path, split: str):
        self.pool = MixedFolderTaskPool(
            root=str(root), split=split, stream_batch_size=BATCH
        )
        self.pool.setup()
        self.pool.test_datasets = {
            task: [data[i] for i in range(len(data))]
            for task, data in self.pool.test_datasets.items()
        }

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        return quiet(self.pool.evaluate, model)

    def batch(self, size: int = BATCH) -> tuple[Tensor, Tensor]:
        """A mixed batch and the tasks of its samples."""
        images, _, owners = next(iter(self.pool._stream(list(self.pool.test_datasets))))
        return images[:size], owners[:size]


def quiet(function, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)


@torch.no_grad()
def ratio(run, plain, repeats: int = 11) -> float:
    """Median over pairs of processor times, measured in turn so that a busy machine slows both."""

    def seconds(function) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    run(), plain()
    return statistics.median(seconds(run) / seconds(plain) for _ in range(repeats))


def spent(model: DynamicModel, stream: Stream, plain: nn.Module) -> float | None:
    """Time of a mixed batch relative to the backbone's; None before a head is fitted."""
    images, owners = stream.batch()
    if model.router is None:
        names = list(stream.pool.test_datasets)
        ids = torch.tensor([model.tasks.index(names[i]) for i in owners])
        return ratio(lambda: model(images, task_ids=ids), lambda: plain(images))
    if model.router.head != "none" and "head_mean" not in model.router._buffers:
        return None
    repeats = 3 if model.router.kind == "representation" else 15
    return ratio(lambda: model(images), lambda: plain(images), repeats)


def pixels_for(router: nn.Module, pixels: list[Tensor]) -> list[Tensor]:
    """Fewer images where each takes T + 1 forwards."""
    few = FEW if router.kind == "representation" else IMAGES
    return [batch[:few] for batch in pixels]


def row(
    label: str, model: nn.Module, stream: Stream, plain: nn.Module, time_: Any = None
) -> dict:
    """One line of the table; ``plain`` is the backbone that times are relative to."""
    model.eval()
    report = stream(model)
    line = {"label": label, "accuracy": report["average"]["accuracy"]}
    line["tasks"] = {t: report[t]["accuracy"] for t in stream.pool.test_datasets}
    if "routing" in report:
        line["routing"] = report["routing"]
    if isinstance(model, DynamicModel):
        line["x_incl"] = model.storage.x_incl
        line["routing_x"] = model.storage.routing_bits / model.storage.unit_bits
        cached = model.router is not None and "features" in vars(model.router)
        if time_ is None and not cached:
            time_ = spent(model, stream, plain)
        line["time"] = time_
    routed = line.get("routing", {}).get("accuracy")
    print(
        f"{label:40s} {100 * line['accuracy']:6.2f}  routing "
        f"{'-' if routed is None else format(100 * routed, '.1f')}  time {line.get('time') or 1:.2f}",
        flush=True,
    )
    return line


def counted(options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Options of a router on a backbone of so many blocks."""
    every = {BLOCKS: range(count)}
    layers = [n for l in options.get("layers", ()) for n in every.get(l, (l,))]
    return {**options, "layers": layers} if layers else {**options}


def chosen(
    model: DynamicModel, stream: Stream, distances: "Distances", base: float
) -> tuple[dict, list]:
    """The options of SE-Merging that are best on validation images."""
    stream.pool.limit = CHOOSING
    tried = []
    for values in itertools.product(*GRID.values()):
        options = counted(dict(zip(GRID, values)), distances.blocks)
        temperature = options.pop("temperature")
        options |= {"hard": temperature is None, "temperature": temperature or 1.0}
        distances(with_router(model, options).router)
        tried.append({**options, "accuracy": stream(model)["average"]["accuracy"]})
    stream.pool.limit = None
    best = max(tried, key=lambda found: found["accuracy"])
    print(f"chosen on validation: {best} (static base {base:.4f})", flush=True)
    return {k: v for k, v in best.items() if k != "accuracy"}, tried


class Distances:
    """Distances of a model's experts at all blocks, computed once per batch; batches are told apart by their sums."""

    def __init__(self, model: DynamicModel):
        self.model, self.known = model, {}
        self.blocks = len(blocks(model.backbone))

    def __call__(self, router: RepresentationRouter) -> None:
        """Make a router look its features up."""
        count = self.blocks
        layers = [layer % count for layer in router.layers]

        def features(model: nn.Module, images: Tensor) -> Tensor:
            key = (float(images.double().sum()), router.merged_weight)
            if key not in self.known:
                self.known[key] = self.compute(images, router.merged_weight)
            kept = self.known[key][router.distance]  # (B, L, T)
            return kept[:, layers].flatten(1)

        router.features = features

    @torch.no_grad()
    def compute(self, images: Tensor, merged_weight: float) -> dict[str, Tensor]:
        router = RepresentationRouter(
            self.model.tasks,
            layers=list(range(self.blocks)),
            merged_weight=merged_weight,
        )
        router.bind(self.model)
        merged = router.merged_states(self.model, (images,), {})
        found: dict[str, list] = {how: [] for how in GRID["distance"]}
        for row in torch.eye(len(self.model.tasks)):
            states = router.states(self.model, row, (images,), {})
            for how in GRID["distance"]:
                each = [distance(m, e, how) for m, e in zip(merged, states)]
                found[how].append(torch.stack(each, 1))  # (B, L)
        return {how: torch.stack(parts, 2) for how, parts in found.items()}


def with_router(model: DynamicModel, options: dict) -> DynamicModel:
    kept = {k: getattr(model.router, k) for k in ("merged_weight", "total_mass")}
    return model.attach_router(
        make_router("representation", model.tasks, **options, **kept)
    )


def measure(root: Path, label: str) -> dict[str, Any]:
    modelpool = FolderCLIPVisionModelPool(root=str(root))
    validation, test = Stream(root, "validation"), Stream(root, "test")
    didi: DynamicModel = quiet(DiDiMerging(budget=1.4).run, modelpool).eval()
    pixels = [load_inputs(modelpool, t, IMAGES, seed=0) for t in didi.tasks]
    plain = modelpool.load_model("_pretrained_").eval()

    rows = [row("DiDi-M, oracle", didi, test, plain)]
    distances = Distances(didi)
    for name, (kind, options) in ROUTERS.items():
        options = counted(options, distances.blocks)
        router = make_router(kind, didi.tasks, **options)
        didi.attach_router(router)
        time_ = None
        if kind == "representation":
            time_ = spent(didi, test, plain)
            distances(router)
        if router.head != "none":
            fit_router_to(didi, pixels_for(router, pixels))
        rows.append(row(f"DiDi-M, {name}", didi, test, plain, time_))
    didi.attach_router(None)

    tried: dict[str, list] = {}
    bases = {
        "averaging": SimpleAverageAlgorithm(inplace=False),
        "task arithmetic": TaskArithmeticAlgorithm(scaling_factor=0.3),
    }
    for name, base in bases.items():
        static = quiet(base.run, modelpool)
        rows.append(row(name, static, test, plain))
        validation.pool.limit = CHOOSING
        on_validation = validation(static)["average"]["accuracy"]
        model = quiet(SEMerging(base_method=base).run, modelpool).eval()
        distances = Distances(model)
        for label_, options in (
            ("as reconstructed", {"temperature": 0.1, "hard": False}),
            ("tuned", None),
            ("discriminant, hard", {"head": "discriminant", "hard": True}),
            ("discriminant, soft", {"head": "discriminant", "hard": False}),
        ):
            if options is None:
                options, tried[name] = chosen(
                    model, validation, distances, on_validation
                )
            if "head" in options:
                options["layers"] = list(range(distances.blocks))
            with_router(model, options)
            time_ = spent(model, test, plain)
            distances(model.router)
            if "head" in options:
                fit_router_to(model, pixels_for(model.router, pixels))
            rows.append(row(f"SE on {name}, {label_}", model, test, plain, time_))
    model.attach_router(None)
    rows.append(row("individuals, oracle", model, test, plain))
    return {
        "suite": label,
        "tasks": didi.tasks,
        "batch": BATCH,
        "images_per_task": IMAGES,
        "rows": rows,
        "tried": tried,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default=None, help="a folder, or demo")
    suite = parser.parse_args().suite
    if suite == "demo":
        root, label = build_suite(), "demo"
    else:
        root = Path(suite) if suite else DEFAULT
        label = root.name
    torch.set_num_threads(1)
    file = HERE / "results" / f"routing_{label}.json"
    write_json(file, measure(root, label))
    from benchmarks.routing_page import write_page

    write_page(
        [json.loads(f.read_text()) for f in sorted(file.parent.glob("routing_*.json"))]
    )


if __name__ == "__main__":
    main()
