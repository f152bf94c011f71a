"""Serving: a batch whose samples belong to different tasks, relative to the plain model on the same batch.

    python -m benchmarks.serving                          # ViT-B/32, eight tasks, batch 64, float32, one thread
    python -m benchmarks.serving --dtype bfloat16
    python -m benchmarks.serving --suite real8            # the small towers of the real suite
    python -m benchmarks.serving --device cuda

DiDi-M is merged for real, once with rounded factors (the default) and once with float32 factors. All rows of a model are
taken in turns with the plain model; figures are medians, on a CPU of processor time. The floor is the floating-point
operations over the rate of a matrix product on this machine. Adds to benchmarks/results/serving.json.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path

import torch
from fusion_bench.modelpool import CLIPVisionModelPool
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fusion_bench_didi import DiDiMerging, DiDiModel
from fusion_bench_didi.demo.folder_pools import FolderCLIPVisionModelPool
from fusion_bench_didi.models import DynamicModel, Serving
from fusion_bench_didi.models.mixed import MixedForward
from fusion_bench_didi.models.tables import MatrixTable, ValueTable
from fusion_bench_didi.routers import make_router

from .checkpoints import pool_of
from .suites import DEFAULT, machine, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "serving.json"
FACTORS = ("auto", "float32")
WAYS = {
    "mixed": Serving(),
    "mixed, a matrix per task": Serving(dense_above=0),
    "mixed, factors only": Serving(dense_above=math.inf, small=0),
    "mixed, matrices made when used": Serving(hold=False),
}
PIECE = 8

Call = Callable[[], object]


def pool_for(arguments: argparse.Namespace) -> CLIPVisionModelPool:
    if arguments.suite:
        root = DEFAULT if arguments.suite == "real8" else Path(arguments.suite)
        return FolderCLIPVisionModelPool(root=str(root))
    return CLIPVisionModelPool(pool_of(arguments.shape, arguments.tasks))


class Clock:
    """Seconds of calls on one device: of the processor on a CPU, where other work may run, else of the wall."""

    def __init__(self, device: str):
        self.device = device

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()

    def __call__(self, call: Call) -> float:
        begin = self.now()
        call()
        return self.now() - begin

    def in_turns(self, calls: dict[str, Call], runs: int) -> dict[str, float]:
        """Medians; every call is made once before."""
        for call in calls.values():
            call()
        found = [
            {name: self(call) for name, call in calls.items()} for _ in range(runs)
        ]
        return {name: statistics.median(run[name] for run in found) for name in calls}


def held(forward: MixedForward) -> int:
    """Bytes of the working copies of a mixed forward."""
    seen: dict[int, int] = {}
    for table in forward.tables.values():
        for tensor in _tensors(table):
            seen[tensor.data_ptr()] = tensor.nbytes
    return sum(seen.values())


def _tensors(table: ValueTable | MatrixTable) -> Iterable[Tensor]:
    if isinstance(table, ValueTable):
        return [table.values]
    kept = getattr(table.matrices, "kept", table.matrices)
    matrices = [matrix for matrix in kept if isinstance(matrix, Tensor)]
    return [table.common, table.first, table.last, *matrices]


def floor_of(plain: nn.Module, pixels: Tensor, clock: Clock) -> float:
    """Seconds of the plain model's products at the rate of one large product."""
    counter = FlopCounterMode(display=False)
    with counter:
        plain(pixels)
    a = torch.randn(3200, 768, device=pixels.device, dtype=pixels.dtype)
    b = torch.randn(768, 3072, device=pixels.device, dtype=pixels.dtype)
    product = clock.in_turns({"": lambda: a @ b}, 9)[""]
    return counter.get_total_flops() / (2 * 3200 * 768 * 3072) * product


def rows_of(
    model: DynamicModel, plain: nn.Module, pixels: Tensor, arguments: argparse.Namespace
) -> dict[str, dict]:
    """Seconds of every way to serve, each beside the plain model in the same turns; working copies one at a time."""
    clock = Clock(arguments.device)
    floor = floor_of(plain, pixels, clock)
    weights = sum(p.nbytes for p in plain.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.tasks), (len(pixels),), generator=generator)
    ids = ids.to(pixels.device)
    model.attach_router(make_router("projection", model.tasks))
    model.set_task(model.tasks[0])
    rows: dict[str, dict] = {}

    def add(calls: dict[str, Call]) -> None:
        seconds = clock.in_turns(
            {"plain": lambda: plain(pixels)} | calls, arguments.runs
        )
        base = seconds["plain"]
        for name, taken in seconds.items():
            row = {"seconds": taken, "ratio": taken / base, "over floor": taken / floor}
            rows.setdefault(name, row)

    add(
        {
            f"plain, {PIECE} at a time": lambda: [
                plain(p) for p in pixels.split(PIECE)
            ],
            "one task": lambda: model(pixels),
            "projection router, mixed": lambda: model(
                pixels, task_weights=model.router.route(model, pixels)
            ),
        }
    )
    for name, way in WAYS.items():
        model.serving = way
        add({name: lambda: model(pixels, task_ids=ids)})
        rows[name]["held"] = held(model.mixed) / weights
    if arguments.compile:
        model.serving = Serving()
        torch._dynamo.reset()
        fast, faster = torch.compile(plain), torch.compile(model)
        add(
            {
                "plain, compiled": lambda: fast(pixels),
                "mixed, compiled": lambda: faster(pixels, task_ids=ids),
            }
        )
    return rows


def switching(model: DynamicModel, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds to set a task, to make its plain model, and to copy the weights once."""
    clock = Clock(arguments.device)
    copies = [p.detach().clone() for p in model.backbone.parameters()]
    tasks = iter(model.tasks * (arguments.runs + 2))

    def copy() -> None:
        for copied, live in zip(copies, model.backbone.parameters()):
            copied.copy_(live)

    calls: dict[str, Call] = {
        "set_task": lambda: model.set_task(next(tasks)),
        "materialize": lambda: model.materialize(model.tasks[0]),
        "copying the weights": copy,
    }
    return clock.in_turns(calls, arguments.runs)


@torch.no_grad()
def serve(model: DynamicModel, plain: nn.Module, arguments: argparse.Namespace) -> dict:
    """All figures of one merged model."""
    dtype = getattr(torch, arguments.dtype)
    x_excl = model.storage.x_excl
    model = model.eval().to(arguments.device)
    model.backbone.to(dtype)  # what is stored stays as it is
    plain = plain.eval().to(arguments.device, dtype)
    side = plain.config.image_size
    pixels = torch.randn(arguments.batch, 3, side, side)
    pixels = pixels.to(arguments.device, dtype)
    return {
        "x_excl": x_excl,
        "rows": rows_of(model, plain, pixels, arguments),
        "switching": switching(model, arguments),
    }


def table(found: dict) -> str:
    """The figures as one Markdown table per merged model."""
    lines = []
    for factors, result in found["models"].items():
        lines += [
            "",
            f"DiDi-M ({result['x_excl']:.2f}), {factors} factors",
            "",
            "| | seconds | plain = 1 | floor = 1 | held beside the files |",
            "|---|--:|--:|--:|--:|",
        ]
        for name, row in result["rows"].items():
            copies = f"{row['held']:.2f}" if "held" in row else ""
            lines.append(
                f"| {name} | {row['seconds']:.3g} | {row['ratio']:.2f} | {row['over floor']:.2f} | {copies} |"
            )
        for name, taken in result["switching"].items():
            ratio = taken / result["rows"]["plain"]["seconds"]
            lines.append(f"| {name} | {taken:.3g} | {ratio:.2f} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("vit-b-32", "vit-l-14"), default="vit-b-32")
    parser.add_argument("--suite", help="real8 or a folder, in place of a shape")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--factors", nargs="+", choices=FACTORS, default=list(FACTORS))
    parser.add_argument(
        "--merged", nargs="+", type=Path, help="saved models, in the order of --factors"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pool = pool_for(arguments)
    found: dict = {"machine": machine(), "models": {}}
    for factors, saved in zip_longest(arguments.factors, arguments.merged or ()):
        plain = pool.load_model("_pretrained_")
        if saved is not None:
            model = DiDiModel.from_pretrained(saved, copy.deepcopy(plain))
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                model = DiDiMerging(budget=1.4, factor_dtype=factors).run(pool)
        found["models"][factors] = serve(model, plain, arguments)
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    what = arguments.suite or arguments.shape
    key = f"{what} {arguments.device} {arguments.dtype} batch {arguments.batch}"
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    models = record.get(key, {}).get("models", {})
    found["models"] = {**models, **found["models"]}
    write_json(RESULTS, {**record, key: found})
    print(f"{key}\n{table(found)}")


if __name__ == "__main__":
    main()
