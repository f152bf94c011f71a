"""Serving: a batch whose samples belong to different tasks, relative to the plain model on the same batch.

    python -m benchmarks.serving                            # real8 and ViT-B/32, float32 and bfloat16, one thread
    python -m benchmarks.serving --on real8 --factors auto float32
    python -m benchmarks.serving --on vit-b-32 --dtypes bfloat16 --no-compile
    python -m benchmarks.serving --on vit-l-14 --device cuda

DiDi-M of eight tasks is merged for real. Every way to serve a batch is timed in turns with the plain model in the same data
type; figures are medians, ratios medians of the ratios of turns, on a CPU of processor time. The floor is the floating-point
operations over the rate of a matrix product on this machine. Adds to benchmarks/results/serving.json and writes
docs/serving.md.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import torch
from fusion_bench.modelpool import CLIPVisionModelPool
from torch import Tensor, nn

from benchmarks.checkpoints import SHAPES, pool_of
from benchmarks.clock import Call, Clock, Rows, floor_of, keep_heap
from benchmarks.serving_page import write_page
from benchmarks.suites import DEFAULT, machine, write_json
from fusion_bench_didi.demo.folder_pools import FolderCLIPVisionModelPool
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.serving.banks import Serving, ValueBank
from fusion_bench_didi.serving.forward import MixedForward
from fusion_bench_didi.serving.making import AnyBank
from fusion_bench_didi.serving.stored import StoredBank

RESULTS = Path(__file__).resolve().parent / "results" / "serving.json"
#: working copies that are not the default, measured on small towers
OTHER_WAYS = {
    "mixed, a matrix per task": Serving(dense_above=0),
    "mixed, factors only": Serving(dense_above=math.inf, small=0),
    "mixed, matrices made when used": Serving(memory_limit_gb=0),
}


def pool_for(what: str, tasks: int) -> CLIPVisionModelPool:
    """Towers of a shape, made on the spot, or those of a suite."""
    if what in SHAPES:
        return CLIPVisionModelPool(pool_of(what, tasks))
    return FolderCLIPVisionModelPool(root=str(DEFAULT if what == "real8" else what))


def held(forward: MixedForward) -> int:
    """Bytes of the working copies of a mixed forward."""
    seen: dict[int, int] = {}
    for bank in forward.banks.values():
        for tensor in _tensors(bank):
            seen[tensor.data_ptr()] = tensor.nbytes
    decoded = 0 if forward.held is None else forward.held.nbytes
    return decoded + sum(seen.values())


def _tensors(bank: AnyBank) -> Iterable[Tensor]:
    if isinstance(bank, StoredBank):
        return []  # what it decoded is the forward's
    if isinstance(bank, ValueBank):
        return [bank.values]
    kept = getattr(bank.matrices, "kept", bank.matrices)
    matrices = [matrix for matrix in kept if isinstance(matrix, Tensor)]
    return [bank.shared, bank.first, bank.last, *matrices]


def rows_of(
    model: DynamicModel,
    plain: nn.Module,
    pixels: Tensor,
    *,
    small: bool,
    compiled: bool,
) -> Rows:
    """Every way to serve, each beside the plain model in the same turns; working copies one kind at a time.

    Random pixels all look like one task to a router. So that its batch is mixed like the others it is run, and its weights
    are then replaced.
    """
    clock = Clock(pixels.device.type)
    weights = sum(p.nbytes for p in plain.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.tasks), (len(pixels),), generator=generator)
    one_hot = torch.eye(len(model.tasks))[ids].to(pixels.device)
    ids = ids.to(pixels.device)
    model.attach_router(make_router("projection", model.tasks))
    model.set_task(model.tasks[0])

    def routed() -> None:
        model.router.route(model, pixels)
        model(pixels, task_weights=one_hot)

    base = {"plain": lambda: plain(pixels)}
    ways: dict[str, Call] = {
        "one task": lambda: model(pixels),
        "mixed": lambda: model(pixels, task_ids=ids),
        "routed": routed,
    }
    if small:
        ways["plain, 8 at a time"] = lambda: [plain(p) for p in pixels.split(8)]
    rows = clock.in_turns(base | ways)
    rows["mixed"]["held"] = held(model.mixed) / weights
    for name, way in OTHER_WAYS.items() if small else ():
        model.serving = way
        found = clock.in_turns(base | {name: lambda: model(pixels, task_ids=ids)})
        rows[name] = found[name]
        rows[name]["held"] = held(model.mixed) / weights
    model.serving = Serving()
    if compiled:
        model(pixels, task_ids=ids)  # the first batch is checked, not compiled
        torch._dynamo.reset()
        fast, faster = torch.compile(plain), torch.compile(model)
        ways = {
            "plain, compiled": lambda: fast(pixels),
            "mixed, compiled": lambda: faster(pixels, task_ids=ids),
        }
        rows |= clock.in_turns(base | ways) | {"plain": rows["plain"]}
    floor = floor_of(plain, pixels, clock)
    for row in rows.values():
        row["over floor"] = row["seconds"] / floor
    return rows


def switching(model: DynamicModel, device: str) -> Rows:
    """Setting a task, making its plain model, and copying the weights once."""
    copies = [p.detach().clone() for p in model.backbone.parameters()]
    tasks = cycle(model.tasks)

    def copy() -> None:
        for copied, live in zip(copies, model.backbone.parameters()):
            copied.copy_(live)

    return Clock(device).in_turns(
        {
            "copying the weights": copy,
            "set_task": lambda: model.set_task(next(tasks)),
            "materialize": lambda: model.materialize(model.tasks[0]),
        }
    )


@torch.no_grad()
def serve(
    model: DynamicModel,
    plain: nn.Module,
    arguments: argparse.Namespace,
    dtype: str,
    *,
    small: bool,
) -> dict:
    """All figures of one merged model in one data type."""
    begin, x_excl = time.perf_counter(), model.storage.x_excl
    has = defaultdict(bool, torch.cpu.get_capabilities())
    kind = getattr(torch, dtype)
    model = model.eval().to(arguments.device)
    model.backbone.to(kind)  # what is stored stays as it is
    plain = plain.eval().to(arguments.device, kind)
    side = plain.config.image_size
    pixels = torch.randn(arguments.batch, 3, side, side)
    pixels = pixels.to(arguments.device, kind)
    options = {"small": small, "compiled": arguments.compile}
    return {
        "x_excl": x_excl,
        "rows": rows_of(model, plain, pixels, **options),
        "switching": switching(model, arguments.device),
        "native_bfloat16": has["avx512_bf16"] or has["amx_bf16"],
        "minutes": (time.perf_counter() - begin) / 60,
    }


def merged(pool: CLIPVisionModelPool, factors: str, budget: float = 1.4) -> DiDiModel:
    with contextlib.redirect_stdout(io.StringIO()):
        return DiDiMerging(budget=budget, factor_dtype=factors).run(pool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--on",
        nargs="+",
        default=["real8", "vit-b-32"],
        help="shapes (vit-b-32, vit-l-14), real8 or folders of towers",
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--factors", nargs="+", default=["auto"])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_heap()
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for what in arguments.on:
        pool = pool_for(what, arguments.tasks)
        for factors in arguments.factors:
            model = merged(pool, factors)
            for dtype in arguments.dtypes:
                pair = copy.deepcopy(model), pool.load_model("_pretrained_")
                found = serve(*pair, arguments, dtype, small=what not in SHAPES)
                key = f"{Path(what).name}, {arguments.device}, {dtype}, batch {arguments.batch}, {factors} factors"
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                record[key] = {**found, "machine": machine(), "peak_gb": peak}
                write_json(RESULTS, record)
                write_page(record)
                print(key, {n: round(r["ratio"], 2) for n, r in found["rows"].items()})


if __name__ == "__main__":
    main()
