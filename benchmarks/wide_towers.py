"""At what budget is 99 % kept as towers grow wider, by the default and by each method of few bits.

    python -m benchmarks.wide_towers --suite DIR --widths 256 768 512 --device cuda --out DIR
    python -m benchmarks.wide_towers --suite DIR --widths 128 --out docs      # the suite's own towers, no training
    python -m benchmarks.wide_towers --pages            # page and figure from docs/wide_towers.json

Trains a base and a fine-tuned tower per task for each width (``benchmarks/wide_training.py``), merges by every row in
processes beside the training (``benchmarks/wide_rows.py``, rows of ``few_bit_rows.py``), and writes OUT/wide_towers.json after every row; rows that are
there are not measured again, and widths whose towers are there are not trained again.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import few_bit_rows, wide_rows
from benchmarks.suites import DEFAULT, machine, write_json
from benchmarks.wide_images import Images, read_images
from benchmarks.wide_page import write_page
from benchmarks.wide_training import Recipe, heads, make_suite

NAME = "wide_towers.json"
#: when the process was started, imports and all
_begun = psutil.Process().create_time()
#: of a worker: images, classifiers, and the towers that were scored last
_worker: dict[str, Any] = {}


def say(text: str) -> None:
    print(f"{time.time() - _begun:6.1f} s  {text}", flush=True)


def start_worker(threads: int, file: str, device: str) -> None:
    """Imports, images and classifiers, once per process."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    held = torch.load(file, weights_only=True)
    images = {
        task: {split: Images(*pair) for split, pair in splits.items()}
        for task, splits in held["images"].items()
    }
    _worker.update(images=images, heads=held["heads"], device=device, roots={})
    if device != "cpu":
        torch.zeros(1, device=device)


def ready(seconds: float) -> int:
    """Keeps a worker for a moment, so that every one is started."""
    time.sleep(seconds)
    return os.getpid()


def run_row(row, config, root: str, reference, merge_device: str) -> dict[str, Any]:
    if root not in _worker["roots"]:
        _worker["roots"] = {
            root: wide_rows.Scoring(Path(root), _worker["images"], _worker["heads"], _worker["device"])
        }  # fmt: skip
    scoring = _worker["roots"][root]
    return wide_rows.measure(row, config, Path(root), scoring, reference, merge_device)


class Record:
    """What was found, on disk after every piece."""

    def __init__(self, file: Path):
        self.file, self.lock = file, threading.Lock()
        self.held = json.loads(file.read_text()) if file.exists() else {"widths": {}}

    def width(self, width: int) -> dict[str, Any]:
        return self.held["widths"].setdefault(str(width), {"rows": {}})

    def add(self, width: int, **facts: Any) -> None:
        with self.lock:
            self.width(width).update(facts)
            write_json(self.file, self.held)

    def add_row(self, width: int, row: dict[str, Any]) -> None:
        with self.lock:
            self.width(width)["rows"][row["key"]] = row
            write_json(self.file, self.held)
        kept = row.get("failed") or f"{row['retention']:.1f} % at {row['x']:.4f}"
        say(f"{width}: {row['key']} {kept}  ({row.get('seconds', 0):.0f} s)")


def towers_of(width: int, arguments, images, record: Record) -> Path:
    """The suite of a width: made, or there already."""
    suite = Path(arguments.suite)
    own = json.loads((suite / "clip" / "config.json").read_text())
    if own["vision_config"]["hidden_size"] == width:
        if "individuals_validation" in record.width(width):
            return suite
        described = json.loads((suite / "tasks.json").read_text())
        found = {
            "base": {t: facts["zero_shot"] for t, facts in described.items()},
            "individuals": {t: facts["fine_tuned"] for t, facts in described.items()},
        }
        scoring = wide_rows.Scoring(suite, images, heads(suite), arguments.device)
        for name in found.copy():
            found[f"{name}_validation"] = {
                task: scoring.score(_tower(suite, "_pretrained_" if name == "base" else task), task, ("validation",))["validation"]
                for task in images
            }  # fmt: skip
        record.add(width, **found)
        return suite
    root = Path(arguments.towers) / str(width)
    if not (root / "tasks.json").exists() or "individuals" not in record.width(width):
        begun = time.time()
        held = {
            task: {split: part.to(arguments.device) for split, part in splits.items()}
            for task, splits in images.items()
        }
        found = make_suite(
            suite, root, width, held, recipe(arguments), arguments.device,
            lambda text: say(f"{width}: {text}"),
        )  # fmt: skip
        seconds = time.time() - begun
        record.add(width, **found, recipe=asdict(recipe(arguments)), seconds=seconds)
    return root


def _tower(suite: Path, name: str):
    from transformers import CLIPVisionModel

    return CLIPVisionModel.from_pretrained(suite / "vision" / name)


def recipe(arguments) -> Recipe:
    asked = {
        "distill_steps": arguments.steps,
        "tune_steps": arguments.tune_steps,
        "distill_batch": arguments.batch,
    }
    return Recipe(**{key: value for key, value in asked.items() if value})


def work(arguments) -> None:
    """Towers in this process, rows in others beside it, until the time is over."""
    torch.backends.cudnn.allow_tf32 = False
    end = _begun + 60 * arguments.minutes
    asked = few_bit_rows.rows(
        tuple(arguments.budgets or few_bit_rows.BUDGETS), not arguments.no_rivals
    )
    configs = {row.key: row.config() for row in asked}
    say(f"{len(asked)} rows per width")
    images = read_images(Path(arguments.suite))
    say("images decoded")
    record = Record(Path(arguments.out) / NAME)
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    here = machine() | {"card": card, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "images.pt"
        torch.save(
            {
                "images": {
                    task: {s: (i.pixels, i.labels) for s, i in splits.items()}
                    for task, splits in images.items()
                },
                "heads": heads(Path(arguments.suite)),
            },
            file,
        )
        pool = ProcessPoolExecutor(
            arguments.processes,
            multiprocessing.get_context("spawn"),
            start_worker,
            (arguments.threads, str(file), arguments.device),
        )
        futures: list[Future] = [
            pool.submit(ready, 1.0) for _ in range(arguments.processes)
        ]
        try:
            needed = 0.0
            for width in arguments.widths:
                begun = time.time()
                if begun + 1.3 * needed + arguments.reserve > end:
                    say(f"{width}: no time is left for its towers and rows")
                    continue
                root = towers_of(width, arguments, images, record)
                needed = max(needed, time.time() - begun)
                record.add(width, machine=here)
                facts = record.width(width)
                reference = {
                    "test": facts["individuals"],
                    "validation": facts["individuals_validation"],
                }
                for row in asked:
                    if row.key in facts["rows"]:
                        continue
                    future = pool.submit(
                        run_row, row, configs[row.key], str(root), reference, arguments.merge_device
                    )  # fmt: skip
                    future.add_done_callback(_taker(record, width))
                    futures.append(future)
            say(f"towers made, {sum(not f.done() for f in futures)} rows to come")
            _, late = wait(futures, timeout=max(1.0, end - time.time()))
            say(f"done; {len(late)} rows were not")
        finally:
            processes = list(pool._processes.values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()


def _taker(record: Record, width: int):
    def take(future: Future) -> None:
        if not future.cancelled() and future.exception() is None:
            record.add_row(width, future.result())
        elif not future.cancelled():
            say(f"{width}: a row was lost, {future.exception()}")

    return take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default=str(DEFAULT))
    parser.add_argument("--widths", nargs="*", type=int, default=[256, 768, 512])
    parser.add_argument("--device", default="cpu", help="to train and score on")
    parser.add_argument("--merge-device", default="cpu")
    parser.add_argument("--out", default="docs")
    parser.add_argument("--towers", default="outputs/wide", help="where towers are put")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument(
        "--reserve", type=float, default=60.0, help="seconds that the rows of a width need"
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--budgets", nargs="*", type=float)
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--steps", type=int, help="of distillation")
    parser.add_argument("--batch", type=int, help="of distillation")
    parser.add_argument("--tune-steps", type=int)
    parser.add_argument("--pages", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.pages:
        write_page()
    else:
        work(arguments)


if __name__ == "__main__":
    main()
