"""Everything that is worth an accelerator, in one command that ends in time.

    python -m benchmarks.gpu --out docs                     # rates, merges, serving: about five minutes, 40 GB of files
    python -m benchmarks.gpu --only merges --minutes 3
    python -m benchmarks.gpu --pages                        # docs/gpu.md from docs/gpu.json

Merges of checkpoints that are made on the spot (ViT-B/32 and L/14 with eight tasks, 1.1 B with four), from files in the
system's cache to a saved model, with the accelerator and some without, beside TSV-M; the time of reading and writing those
bytes is the floor. Then batches of several tasks beside the plain model. Files go where ``FUSION_BENCH_DIDI_CACHE`` says: a
directory in memory, where the disk is slow. Every row is written to gpu.json when it is there. No part takes the time of the
others; where it ends, the page says so. Towers of other widths are another command, ``python -m benchmarks.wide_towers``.
"""

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints
from benchmarks.floor import Machine
from benchmarks.suites import NOTES, in_words, machine, write_json

#: Shape, tasks, budget and method; the most telling first.
MERGES = (
    ("vit-b-32", 8, 1.4, "didi"),
    ("vit-b-32", 8, 0.5, "didi"),
    ("vit-b-32", 8, 0.12, "didi"),
    ("vit-b-32", 8, None, "tsv_m"),
    ("vit-l-14", 8, 1.4, "didi"),
    ("llama-1b", 4, 1.4, "didi"),
    ("vit-b-32", 8, 1.4, "didi_float"),
    ("vit-l-14", 8, 0.5, "didi"),
    ("vit-l-14", 8, None, "tsv_m"),
    ("llama-1b", 4, 0.5, "didi"),
)
#: Without the accelerator: the first that are this many, since TSV-M takes minutes.
ON_THE_CPU = 3
#: What is measured, on what, and the part of the time that is left then which it may take.
PARTS = (("merges", "cuda", 0.45), ("merges", "cpu", 0.4), ("serving", "cuda", 1.0))
SERVING = ("vit-b-32", "vit-l-14")
BATCH = 64
#: What lines of a process begin with that are rows.
ROW = "row "


def rates(device: str) -> dict[str, float]:
    """What the accelerator can do: products in float32 and bfloat16, additions, and copies to it and back."""
    a = torch.randn(4096, 4096, device=device)
    b, held = a.bfloat16(), torch.randn(2**26)
    there = torch.randn(2**26, device=device)
    return {
        "GFLOP/s": 2 * 4096**3 / seconds_of(lambda: a @ a) / 1e9,
        "bfloat16 GFLOP/s": 2 * 4096**3 / seconds_of(lambda: b @ b) / 1e9,
        "elementwise G/s": there.numel() / seconds_of(lambda: there.add_(1)) / 1e9,
        "to it GB/s": held.nbytes / seconds_of(lambda: held.to(device)) / 1e9,
        "from it GB/s": held.nbytes / seconds_of(lambda: there.cpu()) / 1e9,
    }


def seconds_of(function, runs: int = 5) -> float:
    """Least of some runs, the first not counted."""
    found = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def merge(
    shape: str, tasks: int, budget: float | None, method: str, device: str
) -> dict[str, Any]:
    """One merge in this process."""
    from fusion_bench.method import TaskSingularVectorMerging

    from benchmarks.scaling import Case
    from fusion_bench_didi.method.didi import DiDiMerging
    from fusion_bench_didi.programs.measure import peak_resident

    if device == "cuda":
        torch.linalg.qr(torch.ones(2, 2, device=device))  # starts it, and its libraries
        torch.cuda.reset_peak_memory_stats()
    directories = checkpoints.pool_of(shape, tasks)
    base = Path(directories["_pretrained_"]).parent
    pool = Case(shape, tasks, budget or 0.0).pool(base)()
    with tempfile.TemporaryDirectory(dir=base) as place:
        begun = time.perf_counter()
        if method == "tsv_m":
            made = TaskSingularVectorMerging(alpha=1.0).run(pool)
        else:
            factors = "checkpoint" if method == "didi_float" else "auto"
            made = DiDiMerging(budget=budget, factor_dtype=factors).run(pool)
        made.save_pretrained(Path(place) / "out")
        taken = time.perf_counter() - begun
        files = [f for f in Path(place).rglob("*") if f.is_file()]
        info = getattr(made, "info", None) or {}
        return {
            "seconds": taken,
            "stages": info.get("seconds"),
            "relative_error": info.get("relative_error"),
            "read": sum(
                f.stat().st_size
                for directory in directories.values()
                for f in Path(directory).glob("*.safetensors")
            ),
            "written": sum(f.stat().st_size for f in files),
            "peak_gb": peak_resident() / 2**30,
            "device_gb": (
                torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
            ),
        }


def make_pools() -> None:
    """All checkpoints, on all cores; before anything is timed."""
    todo = [(*case, i) for case in {case[:2]: None for case in MERGES} for i in range(case[1] + 1)]  # fmt: skip
    with ProcessPoolExecutor(os.cpu_count(), initializer=_one_thread) as pool:
        list(pool.map(checkpoints.make, *zip(*todo)))


def _one_thread() -> None:
    torch.set_num_threads(1)


def rows_of(what: str, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """What a process of this module finds, row by row; ends with what it said where it fails or takes too long."""
    shown = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--child", what, device]  # fmt: skip
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, **shown},
        ) as running,
    ):
        over = threading.Timer(max(seconds, 0), running.kill)
        over.start()
        for line in running.stdout:
            if line.startswith(ROW):
                yield json.loads(line.removeprefix(ROW))
        over.cancel()
        if running.wait():
            said.seek(0)
            late = running.returncode == -signal.SIGKILL
            yield {"failed": "no time was left" if late else said.read()[-1500:]}


def child(what: str, device: str) -> None:
    """Every row of one kind, printed when it is there."""
    if what == "merges":
        cases = MERGES if device == "cuda" else MERGES[:ON_THE_CPU]
        for case in cases:
            found = {"case": [*case, device], **merge(*case, device)}
            print(ROW + json.dumps(found), flush=True)
    else:
        for shape in SERVING:
            for budget in (1.4, 0.25):
                for found in serve(shape, budget, device):
                    print(ROW + json.dumps(found), flush=True)


def serve(shape: str, budget: float, device: str) -> Iterator[dict[str, Any]]:
    """Rows of ``benchmarks/serving.py`` for one model in both types."""
    from benchmarks import serving

    pool = serving.pool_for(shape, 8)
    model = serving.merged(pool, "auto", budget)
    options = argparse.Namespace(device=device, batch=BATCH, compile=False)
    for dtype in ("bfloat16", "float32"):
        plain = pool.load_model("_pretrained_")
        pair = copy.deepcopy(model), plain
        found = serving.serve(*pair, options, dtype, small=False)
        yield {"model": f"{shape}, {budget}, {dtype}", **found}


def measure(arguments: argparse.Namespace) -> None:
    end, file = time.monotonic() + 60 * arguments.minutes, arguments.out / "gpu.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def keep(key: str, value: Any) -> None:
        found[key] = value
        write_json(file, found)

    make_pools()  # its processes are forked before the accelerator is started
    print(f"checkpoints made, {end - time.monotonic():.0f} s left", flush=True)
    name, cores = torch.cuda.get_device_name(), os.cpu_count()
    keep("machine", {**machine(), "accelerator": name, "cores": cores})
    keep("rates", rates("cuda"))
    where = checkpoints.root() / "vit-b-32" / "_pretrained_"
    keep("processor", asdict(Machine.measured(where)))
    for what, device, part in PARTS:
        if what not in arguments.only:
            continue
        key = what if device == "cuda" else f"{what} without"
        rows: list[dict[str, Any]] = []
        for row in rows_of(what, device, part * (end - time.monotonic())):
            rows.append(row)
            keep(key, rows)
            print(f"{end - time.monotonic():.0f} s left: {row}", flush=True)


def page(found: dict[str, Any]) -> str:
    """The page's text."""
    parts = (found.get(key, ()) for key in ("merges", "merges without", "serving"))
    rows = [[row for row in part if "failed" not in row] for part in parts]
    ended = [f"{key}: {row['failed'].strip().splitlines()[-1]}" for key in found for row in _listed(found[key]) if "failed" in row]  # fmt: skip
    return (NOTES / "gpu.md").read_text().format(
        machine=in_words(found["machine"]),
        rates=", ".join(f"{name} {value:,.0f}" for name, value in found["rates"].items()),
        merges="\n".join(_merges([*rows[0], *rows[1]], found["processor"])),
        serving="\n".join(_serving(rows[2])),
        ended="\n".join(["Where the time was over:", "", *(f"- {one}" for one in ended)]) if ended else "",
    ).rstrip() + "\n"  # fmt: skip


def _listed(value: Any) -> list[dict[str, Any]]:
    return value if isinstance(value, list) else []


def _merges(rows: list[dict[str, Any]], processor: dict[str, float]) -> Iterator[str]:
    yield "| model | tasks | budget | method | on | seconds | over floor | scan | decompose | refine | peak GB | on it GB | relative error |"
    yield "|---|--:|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    titles = {"didi": "DiDi", "didi_float": "DiDi, float factors", "tsv_m": "TSV-M"}
    for row in rows:
        shape, tasks, budget, method, device = row["case"]
        least = row["read"] / processor["read"] + row["written"] / processor["write"]
        stages = row["stages"] or {}
        cells = [
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / least:.1f}",
            *(f"{stages[s]:.1f}" if s in stages else "" for s in ("scan", "decompose", "refine")),
            f"{row['peak_gb']:.1f}",
            f"{row['device_gb']:.1f}" if row["device_gb"] else "",
            f"{row['relative_error']:.4f}" if row["relative_error"] is not None else "",
        ]  # fmt: skip
        yield f"| {shape} | {tasks} | {budget or ''} | {titles[method]} | {device} | {' | '.join(cells)} |"


def _serving(models: list[dict[str, Any]]) -> Iterator[str]:
    if not models:
        yield "Batches of several tasks were not measured: the time was over."
        return
    yield from ("## Batches of several tasks", "")
    yield f"{BATCH} images of eight tasks, seconds relative to the plain model in turns; *held*: working copies in models of this type."
    yield from ("", "| model, budget, type | way | seconds | of plain | held |", "|---|---|--:|--:|--:|")  # fmt: skip
    for one in models:
        for way, row in one["rows"].items():
            held = f"{row['held']:.1f}" if "held" in row else ""
            yield f"| {one['model']} | {way} | {row['seconds']:.4f} | {row['ratio']:.2f} | {held} |"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", default=["merges", "serving"])
    parser.add_argument("--pages", action="store_true", help="measure nothing")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    if not arguments.pages:
        measure(arguments)
    found = json.loads((arguments.out / "gpu.json").read_text())
    (arguments.out / "gpu.md").write_text(page(found))


if __name__ == "__main__":
    main()
