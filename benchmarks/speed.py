"""Merging from files to a saved model: seconds and peak memory of DiDi beside the host's methods.

    python -m benchmarks.speed                    # ViT-B/32, eight tasks: DiDi, TSV-M, EMR, SMILE, WUDI
    python -m benchmarks.speed --cold --only didi tsv_m  # files and floor from the disk instead of the system's cache
    python -m benchmarks.speed budgets            # DiDi at small budgets, and TSV-M
    python -m benchmarks.speed growth             # DiDi over numbers of tasks (--counts, with 8), and over --sizes
    python -m benchmarks.speed --device cuda --only didi didi_float tsv_m

Every run is a process of its own, imports not counted. Medians over ``--runs`` (peers of many minutes run once). WUDI is
timed for ``--wudi-steps`` of its 300 steps and scaled. Results go to docs/speed.json and .md.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.checkpoints import SHAPES, pool_of
from benchmarks.cost_rates import Rates, beside, mean_of
from benchmarks.floor import Decomposed, Machine, floor, forget, seconds
from benchmarks.methods import AT_BUDGETS, METHODS, PEERS
from benchmarks.speed_page import write_page
from benchmarks.suites import machine, write_json
from fusion_bench_didi.programs.measure import peak_resident

WUDI_STEPS = 300
ONCE = ("wudi", "smile", "didi_exact", "didi_float_exact")
GROWING = ("didi", "didi_per_task", "didi_float")
TASKS, SIZES = (2, 4, 8, 16, 20), ("vit-b-32", "vit-l-14")


def child(method: str, arguments: argparse.Namespace) -> dict:
    """One merge in this process."""
    import fusion_bench.method  # noqa: F401  imports are not part of the merge
    from fusion_bench.modelpool import CausalLMPool, CLIPVisionModelPool
    from omegaconf import DictConfig

    decomposed = _recorded()
    directories = pool_of(arguments.shape, arguments.tasks)
    where = Path(directories["_pretrained_"]).parent
    language = arguments.shape.startswith("llama")
    with tempfile.TemporaryDirectory(dir=where) as place:
        begin = time.perf_counter()
        if language:
            kwargs = DictConfig({"torch_dtype": "bfloat16"})  # float32 if not told
            pool = CausalLMPool(directories, tokenizer=None, model_kwargs=kwargs)
        else:
            pool = CLIPVisionModelPool(directories)
        model = METHODS[method][1](
            pool,
            Path(place) / "out",
            steps=arguments.wudi_steps,
            device=arguments.device,
        )
        taken = time.perf_counter() - begin
        written = sum(f.stat().st_size for f in Path(place).rglob("*") if f.is_file())
        info = getattr(model, "info", None) or {}
        result = {
            "seconds": taken,
            "peak_gb": peak_resident() / 2**30,
            "written": written,
            "stages": info.get("seconds"),
            "relative_error": info.get("relative_error"),
            "decomposed": decomposed,
        }
    return result


def _recorded() -> list[Decomposed]:
    """A list of what DiDi decomposes from here on."""
    from fusion_bench_didi.merging import spectra

    found: list[Decomposed] = []
    decompose = spectra._decompose

    def recorded(context, bounds, name: str, vectors, reach: int, shared_rank):
        modules = len(vectors) + (shared_rank != 0)
        found.append((context.sides(name), reach, modules))
        return decompose(context, bounds, name, vectors, reach, shared_rank)

    spectra._decompose = recorded
    return found


def measure(method: str, shape: str, tasks: int, arguments) -> dict:
    """One merge in a process of its own.

    Raises:
        SystemExit: with what it printed last, if it fails.
    """
    command = [sys.executable, "-m", "benchmarks.speed", "--child", method]
    command += ["--shape", shape, "--tasks", str(tasks), "--device", arguments.device]
    command += ["--wudi-steps", str(arguments.wudi_steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if method == "wudi":
        result["seconds"] *= WUDI_STEPS / arguments.wudi_steps
    shown = {key: value for key, value in result.items() if key != "decomposed"}
    print(method, shape, tasks, shown, flush=True)
    return result


def medians(runs: list[dict]) -> dict:
    """The run of median time, with the number of runs and the spread of their times."""
    order = sorted(runs, key=lambda run: run["seconds"])
    middle = order[(len(order) - 1) // 2]
    times = [run["seconds"] for run in order]
    return {**middle, "runs": len(runs), "fastest": times[0], "slowest": times[-1]}


def side_by_side(arguments: argparse.Namespace) -> dict:
    """Every method at one shape, taken in turns; the floor of the same machine."""
    shape, tasks = arguments.shape, arguments.tasks
    pool, cold = pool_of(shape, tasks), arguments.cold
    if not cold:
        _read_once(pool)
    rows = AT_BUDGETS if arguments.what == "budgets" else PEERS
    names = arguments.only or rows
    found: dict[str, list[dict]] = {name: [] for name in names}
    speeds: list[Machine] = []
    rates_of: list[Rates] = []
    for run in range(arguments.runs):
        speeds.append(Machine.measured(Path(pool["_pretrained_"]), cold=cold))
        rates_of += [_rates(pool)] if arguments.device == "cpu" and not cold else []
        for name in names:
            if run == 0 or name not in ONCE:
                for file in _files(pool) if cold else ():
                    forget(file)
                found[name].append(measure(name, shape, tasks, arguments))
    rows = {name: medians(runs) for name, runs in found.items()}
    speed = Machine.median(speeds)
    for name, row in rows.items():
        decomposed = row.pop("decomposed")
        if name.startswith("didi"):
            row["floor"] = seconds(floor(pool, decomposed, row["written"]), speed)
    rates = {"GFLOP/s": speed.flops / 1e9}
    rates |= {"elementwise G/s": speed.elementwise / 1e9}
    rates |= {"read GB/s": speed.read / 1e9, "write GB/s": speed.write / 1e9}
    found_here = {"cost rates": asdict(mean_of(rates_of))} if rates_of else {}
    return {"shape": shape, "tasks": tasks, "rates": rates, **found_here, "rows": rows}


def _rates(pool: Mapping[str, str]) -> Rates:
    """For ``benchmarks.cost_model``, by the clock of the wall on as many threads as a merge has."""
    return beside(1, torch.get_num_threads(), Path(pool["_pretrained_"]))


def growth(arguments: argparse.Namespace, before: dict) -> dict:
    """DiDi-M over numbers of tasks at the first size, and over sizes at eight tasks; with fitted exponents.

    With float factors every matrix is decomposed at every number of tasks. The default decomposes nothing where the budget
    stores matrices whole in a few bits, as a fixed budget does for few tasks: its exponent is of two kinds of work.

    Args:
        before: what was found earlier; kept for methods that are not measured now.
    """
    counts, sizes = arguments.counts, arguments.sizes
    cells = [(sizes[0], t) for t in counts] + [(size, 8) for size in sizes[1:]]
    chosen = arguments.only or GROWING
    rows = [row for row in before.get("rows", ()) if row["method"] not in chosen]
    exponents = dict(before.get("exponents", {}))
    for method in chosen:
        times: dict[tuple[str, int], float] = {}
        for shape, tasks in cells:
            _read_once(pool_of(shape, tasks))
            runs = [
                measure(method, shape, tasks, arguments) for _ in range(arguments.runs)
            ]
            row = {"method": method, "shape": shape, "tasks": tasks, **medians(runs)}
            del row["decomposed"]
            if arguments.device == "cpu":
                row["rates"] = asdict(_rates(pool_of(shape, tasks)))
            rows.append(row)
            times[shape, tasks] = row["seconds"]
        exponents[method] = {
            "tasks": _slope(counts, [times[sizes[0], t] for t in counts])
        }
        if len(sizes) > 1:
            eight = [times[size, 8] for size in sizes]
            parameters = [_parameters(size) for size in sizes]
            exponents[method]["parameters"] = _slope(parameters, eight)
    return {"rows": rows, "exponents": exponents}


def _read_once(pool: Mapping[str, str]) -> None:
    """So that the first run finds the files in memory as the others do."""
    for file in _files(pool):
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass


def _files(pool: Mapping[str, str]) -> list[Path]:
    return [f for d in pool.values() for f in Path(d).glob("*.safetensors")]


def _parameters(shape: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SHAPES[shape].build().parameters())


def _slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of log y over log x."""
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mu, mv = statistics.mean(u), statistics.mean(v)
    spread = sum((a - mu) ** 2 for a in u)
    return sum((a - mu) * (b - mv) for a, b in zip(u, v)) / spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("peers", "budgets", "growth")
    parser.add_argument("what", nargs="?", choices=kinds, default="peers")
    parser.add_argument("--shape", choices=SHAPES, default="vit-b-32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=METHODS)
    parser.add_argument("--counts", nargs="+", type=int, default=TASKS)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=SIZES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--wudi-steps", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cold", action="store_true", help="read files from the disk; peers only"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments)))
        return
    if arguments.cold and arguments.what != "peers":
        parser.error(f"--cold is for the methods side by side, not {arguments.what}")
    file = arguments.out / "speed.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    if arguments.what == "growth":
        found = growth(arguments, record.get("growth", {}))
    else:
        found = side_by_side(arguments)
    what = "cold" if arguments.cold else arguments.what
    record[what] = {"machine": machine(), "device": arguments.device, **found}
    write_json(file, record)
    write_page(record, arguments.out / "speed.md")


if __name__ == "__main__":
    main()
