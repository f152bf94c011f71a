"""Everything that is worth an accelerator, in one command that ends in time.

    python -m benchmarks.gpu --out docs                     # rates, merges, serving: about five minutes, 40 GB of files
    python -m benchmarks.gpu --only merges --minutes 3
    python -m benchmarks.gpu --pages                        # docs/gpu.md from docs/gpu.json

Merges of checkpoints that are made on the spot (ViT-B/32 and L/14 with eight tasks, 1.1 B with four), from files in the
system's cache to a saved model, each in a process of its own with the accelerator and without, beside TSV-M; the time of
reading and writing those bytes is the floor. Then batches of several tasks beside the plain model. Files go where
``FUSION_BENCH_DIDI_CACHE`` says: a directory in memory, where the disk is slow. Every figure is written to gpu.json when it is
there, and what no time is left for is named.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints
from benchmarks.floor import Machine
from benchmarks.suites import in_words, machine, write_json

#: shape, tasks, budget, method, device; the most telling first
MERGES = (
    ("vit-b-32", 8, 1.4, "didi", "cuda"),
    ("vit-b-32", 8, 1.4, "didi", "cpu"),
    ("vit-b-32", 8, 0.5, "didi", "cuda"),
    ("vit-b-32", 8, 0.5, "didi", "cpu"),
    ("vit-b-32", 8, 0.12, "didi", "cuda"),
    ("vit-b-32", 8, 0.12, "didi", "cpu"),
    ("vit-b-32", 8, None, "tsv_m", "cuda"),
    ("vit-b-32", 8, 1.4, "didi_float", "cuda"),
    ("vit-l-14", 8, 1.4, "didi", "cuda"),
    ("llama-1b", 4, 1.4, "didi", "cuda"),
    ("vit-l-14", 8, 1.4, "didi", "cpu"),
    ("llama-1b", 4, 1.4, "didi", "cpu"),
    ("vit-l-14", 8, None, "tsv_m", "cuda"),
    ("vit-l-14", 8, 0.5, "didi", "cuda"),
    ("vit-b-32", 8, None, "tsv_m", "cpu"),
    ("llama-1b", 4, 0.5, "didi", "cuda"),
    ("vit-l-14", 8, 0.5, "didi", "cpu"),
)
SERVING = ("vit-b-32", "vit-l-14")
BATCH = 64


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


def merge(shape: str, tasks: int, budget: float | None, method: str, device: str):
    """One merge in this process."""
    import fusion_bench.method  # noqa: F401  imports are not part of the merge
    from fusion_bench.method import TaskSingularVectorMerging
    from fusion_bench.modelpool import CausalLMPool, CLIPVisionModelPool
    from omegaconf import DictConfig

    from fusion_bench_didi.method.didi import DiDiMerging
    from fusion_bench_didi.programs.measure import peak_resident

    if device == "cuda":
        torch.linalg.qr(torch.ones(2, 2, device=device))  # starts it, and its libraries
        torch.cuda.reset_peak_memory_stats()
    directories = checkpoints.pool_of(shape, tasks)
    if shape.startswith("llama"):
        kwargs = DictConfig({"torch_dtype": "bfloat16"})  # float32 if not told
        pool = CausalLMPool(directories, tokenizer=None, model_kwargs=kwargs)
    else:
        pool = CLIPVisionModelPool(directories)
    base = Path(directories["_pretrained_"]).parent
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
            "written": sum(f.stat().st_size for f in files),
            "peak_gb": peak_resident() / 2**30,
            "device_gb": (
                torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
            ),
        }


def make_pools(workers: int) -> None:
    """All checkpoints, several at once."""
    for shape, tasks in {case[:2]: None for case in MERGES}:
        names = range(tasks + 1)
        if not (checkpoints.root() / shape / f"task{tasks - 1:02d}").is_dir():
            with ProcessPoolExecutor(workers, initializer=_one_thread) as pool:
                list(pool.map(_make, [shape] * len(names), [tasks] * len(names), names))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _make(shape: str, tasks: int, index: int) -> None:
    checkpoints.make(shape, tasks, index)


class Clock:
    """How much time is left."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self._end - time.monotonic()


def child(arguments: list[str], device: str, clock: Clock) -> Any:
    """What a process of this module finds; what it said where it fails or takes too long."""
    shown = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=max(clock.left(), 1),
            env={**os.environ, **shown},
        )
    except subprocess.TimeoutExpired:
        return {"failed": "no time was left"}
    if done.returncode:
        return {"failed": done.stderr[-1500:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def serve(shape: str, budget: float, dtype: str) -> dict[str, Any]:
    """Rows of ``benchmarks/serving.py`` for one model."""
    from benchmarks import serving

    pool = serving.pool_for(shape, 8)
    model = serving.merged(pool, "auto", budget)
    plain = pool.load_model("_pretrained_")
    options = argparse.Namespace(device="cuda", batch=BATCH, compile=False)
    return serving.serve(model, plain, options, dtype, small=False)


def measure(arguments: argparse.Namespace) -> None:
    clock, file = Clock(arguments.minutes), arguments.out / "gpu.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def keep(key: str, value: Any) -> None:
        found[key] = value
        write_json(file, found)

    keep("machine", {**machine(), "accelerator": torch.cuda.get_device_name()})
    keep("rates", rates("cuda"))
    begun = time.perf_counter()
    make_pools(os.cpu_count() or 1)
    print(f"checkpoints made in {time.perf_counter() - begun:.0f} s", flush=True)
    here = Machine.measured(checkpoints.root() / "vit-b-32" / "_pretrained_")
    keep("processor", {**asdict(here), "cores": os.cpu_count()})
    if "merges" in arguments.only:
        rows: list[dict[str, Any]] = []
        for case in MERGES:
            row = {"case": list(case), **child(["--merge", json.dumps(case)], case[-1], clock)}  # fmt: skip
            rows.append(row)
            print({key: row[key] for key in row if key != "failed"}, row.get("failed", "")[-600:], flush=True)  # fmt: skip
            keep("merges", rows)
    if "serving" in arguments.only:
        served = {}
        for shape in SERVING:
            for budget in (1.4, 0.25):
                for dtype in ("bfloat16", "float32"):
                    case = (shape, budget, dtype)
                    served[f"{shape}, {budget}, {dtype}"] = child(["--serve", json.dumps(case)], "cuda", clock)  # fmt: skip
                    print(case, served[f"{shape}, {budget}, {dtype}"], flush=True)
                    keep("serving", served)


def page(found: dict[str, Any]) -> list[str]:
    """The page's lines."""
    lines = [
        "# On an accelerator",
        "",
        f"`python -m benchmarks.gpu`; {in_words(found['machine'])}, {found['processor']['cores']} cores. "
        + ", ".join(f"{name} {value:,.0f}" for name, value in found["rates"].items())
        + ".",
        "",
        "## Merges",
        "",
        "From files in the system's cache to a saved model, one run each, without imports and the start of the accelerator. *Floor*: "
        "reading every",
        "file and writing what is stored, at the rates of this machine.",
        "",
        "| model | tasks | budget | method | on | seconds | over floor | scan | decompose | refine | peak GB | on it GB | relative error |",
        "|---|--:|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    titles = {"didi": "DiDi", "didi_float": "DiDi, float factors", "tsv_m": "TSV-M"}
    for row in found.get("merges", ()):
        shape, tasks, budget, method, device = row["case"]
        start = f"| {shape} | {tasks} | {budget or ''} | {titles[method]} | {device} |"
        if "failed" in row:
            lines.append(f"{start} {row['failed'].strip().splitlines()[-1][:80]} |" + " |" * 7)  # fmt: skip
            continue
        least = row["read"] / found["processor"]["read"] + row["written"] / found["processor"]["write"]  # fmt: skip
        stages = row["stages"] or {}
        cells = [
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / least:.1f}",
            *(f"{stages[s]:.1f}" if s in stages else "" for s in ("scan", "decompose", "refine")),
            f"{row['peak_gb']:.1f}",
            f"{row['device_gb']:.1f}" if row["device_gb"] else "",
            f"{row['relative_error']:.4f}" if row["relative_error"] is not None else "",
        ]  # fmt: skip
        lines.append(f"{start} {' | '.join(cells)} |")
    if "serving" in found:
        lines += [
            "",
            "## Batches of several tasks",
            "",
            f"{BATCH} images of eight tasks, seconds relative to the plain model in turns; *held*: working copies in models of this type.",
            "",
            "| model, budget, type | way | seconds | of plain | held |",
            "|---|---|--:|--:|--:|",
        ]
        for name, one in found["serving"].items():
            if "failed" in one:
                lines.append(f"| {name} | {one['failed'].strip().splitlines()[-1][:80]} | | | |")  # fmt: skip
                continue
            for way, row in one["rows"].items():
                held = f"{row['held']:.1f}" if "held" in row else ""
                lines.append(f"| {name} | {way} | {row['seconds']:.4f} | {row['ratio']:.2f} | {held} |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", default=["merges", "serving"])
    parser.add_argument("--pages", action="store_true", help="measure nothing")
    parser.add_argument("--merge", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.merge:
        files = checkpoints.pool_of(*arguments.merge[:2]).values()
        read = sum(f.stat().st_size for d in files for f in Path(d).glob("*.safetensors"))  # fmt: skip
        print(json.dumps({**merge(*arguments.merge), "read": read}))
    elif arguments.serve:
        print(json.dumps(serve(*arguments.serve)))
    else:
        if not arguments.pages:
            measure(arguments)
        found = json.loads((arguments.out / "gpu.json").read_text())
        (arguments.out / "gpu.md").write_text("\n".join(page(found)) + "\n")


if __name__ == "__main__":
    main()
