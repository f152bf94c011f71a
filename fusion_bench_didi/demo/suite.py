"""Making the demo suite, once, and finding it again.

::

    <cache>/demo-v1-seed0/
        clip/                    CLIPModel and CLIPProcessor of the base model
        vision/_pretrained_/     its vision tower
        vision/<task>/           a vision tower fine-tuned on the task
        data/<task>/             train, validation and test pictures as parquet
        suite.json               class names and validation accuracies

The folder is made under another name and renamed when it is whole, under a lock, so a
folder of that name is complete whatever was interrupted and whoever else was building.
"""

import copy
import io
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Mapping

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import CLIPModel

from ..checkpoint.directory import alone
from ..errors import SettingsError
from ..files import from_home
from . import towers, training
from .tasks import EXTRAS, TASKS, Pictures, Split, Task, tame_pictures, task_pictures
from .training import Schedule

FORMAT = 1
"""Goes into the folder's name; raise it whenever the same seed gives another suite."""

CACHE_VARIABLE = "FUSION_BENCH_DIDI_CACHE"

#: ``full``: tasks that are learned, in one to three minutes. ``tiny``: three tasks in seconds, for tests.
Size = Literal["full", "tiny"]


@dataclass(frozen=True)
class Recipe:
    """Tasks, sizes and training of a suite."""

    minutes: str  # for the message to whoever waits
    tasks: tuple[Task, ...]
    extras: tuple[Task, ...]
    width: int
    layers: int
    tame_per_class: int
    wildest: float  # of the tame pictures, see drawing
    splits: Mapping[Split, int]
    pretraining: Schedule
    fine_tuning: Schedule


RECIPES: dict[str, Recipe] = {
    "full": Recipe(
        minutes="one to three minutes",
        tasks=TASKS,
        extras=EXTRAS,
        width=96,
        layers=3,
        tame_per_class=100,
        wildest=0.5,
        splits={"train": 1000, "validation": 250, "test": 500},
        pretraining=Schedule(steps=1200, batch=64, rate=3e-3, shift=2),
        fine_tuning=Schedule(steps=180, batch=64, rate=3e-3, shift=2),
    ),
    "tiny": Recipe(
        minutes="some seconds",
        tasks=tuple(
            task for task in TASKS if task.name in ("digits", "shapes", "textures")
        ),
        extras=(),
        width=48,
        layers=2,
        tame_per_class=8,
        wildest=0.5,
        splits={"train": 64, "validation": 32, "test": 32},
        pretraining=Schedule(steps=20, batch=64, rate=2e-3),
        fine_tuning=Schedule(steps=10, batch=32, rate=1e-3),
    ),
}


def default_cache() -> Path:
    """Where suites live unless told otherwise."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "fusion_bench_didi"


def suite_path(
    cache_dir: str | Path | None = None, seed: int = 0, *, size: Size = "full"
) -> Path:
    """The folder of a suite, whether or not it is there yet."""
    if size not in RECIPES:
        raise SettingsError(f"size: {size!r} is not one of {', '.join(RECIPES)}.")
    root = from_home(cache_dir) if cache_dir else default_cache()
    middle = "" if size == "full" else f"-{size}"
    return root.absolute() / f"demo-v{FORMAT}{middle}-seed{seed}"


def build_suite(
    cache_dir: str | Path | None = None,
    seed: int = 0,
    *,
    size: Size = "full",
    workers: int | None = None,
) -> Path:
    """Make the suite unless it is there, and return its folder.

    Args:
        cache_dir: where suites live; ``$FUSION_BENCH_DIDI_CACHE`` or
            ``~/.cache/fusion_bench_didi`` if None.
        seed: decides every picture and every weight.
        size: ``full`` has eight tasks; ``tiny`` has three and is for tests, good at nothing.
        workers: trainings side by side, torch's number of threads if None; has no
            influence on what is made.
    """
    final = suite_path(cache_dir, seed, size=size)
    if is_complete(final):
        return final
    with alone(final, patience=math.inf):
        if is_complete(final):  # another process made it while we waited
            return final
        _sweep(final)
        unfinished = final.with_name(f".{final.name}.unfinished-{os.getpid()}")
        _say(f"Making the demo suite in {final}: {RECIPES[size].minutes}, this once.")
        try:
            _make(unfinished, RECIPES[size], seed, workers or torch.get_num_threads())
            os.replace(unfinished, final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return final


def is_complete(path: Path) -> bool:
    """``suite.json`` is the last file of a suite to be written, before its renaming."""
    return (path / "suite.json").is_file()


def _sweep(final: Path) -> None:
    """Remove what a killed build left; the caller holds the lock, so nobody is at it."""
    for leftover in [final, *final.parent.glob(f".{final.name}.unfinished-*")]:
        if leftover.exists():
            shutil.rmtree(leftover)


def _say(line: str) -> None:
    print(f"[demo suite] {line}", file=sys.stderr, flush=True)


def _make(folder: Path, recipe: Recipe, seed: int, workers: int) -> None:
    started = time.perf_counter()

    def done(line: str) -> None:
        _say(f"{time.perf_counter() - started:6.1f} s  {line}")

    known = (*recipe.tasks, *recipe.extras)
    classnames = [name for task in known for name in task.classnames]
    tame = _mixture(known, recipe, seed)
    done(f"drew {len(tame)} tame pictures for pre-training")
    data = {
        task.name: task_pictures(task, recipe.splits, seed) for task in recipe.tasks
    }
    for task in recipe.tasks:
        _write_pictures(folder / "data" / task.name, task, data[task.name])
    done(f"drew the pictures of {len(data)} tasks")

    processor = towers.make_processor(classnames)
    words = len(processor.tokenizer)
    first_id = words - len(classnames)
    clip = towers.make_clip(
        width=recipe.width, layers=recipe.layers, words=words, seed=seed
    )
    with training.side_by_side(workers) as pool:
        embeddings = training.pretrain(
            clip, tame, len(classnames), recipe.pretraining, seed, pool
        )
        towers.set_class_embeddings(clip, first_id, embeddings)
        clip.save_pretrained(folder / "clip")
        processor.save_pretrained(folder / "clip")
        towers.save_vision_tower(clip, folder / "vision" / "_pretrained_")
        done("pre-trained the base model")

        def specialize(task: Task) -> dict[str, object]:
            ids = processor.tokenizer(
                task.classnames, padding=True, return_tensors="pt"
            )
            heads = training.text_features(clip, ids["input_ids"]).detach()
            tuned: CLIPModel = copy.deepcopy(clip)
            splits = data[task.name]
            training.fine_tune(tuned, heads, splits["train"], recipe.fine_tuning, seed)
            towers.save_vision_tower(tuned, folder / "vision" / task.name)
            before, after = (
                training.accuracy(m, heads, splits["validation"]) for m in (clip, tuned)
            )
            done(f"fine-tuned on {task.name}: accuracy {before:.0%} -> {after:.0%}")
            return {
                "classnames": task.classnames,
                "zero_shot": round(before, 4),
                "fine_tuned": round(after, 4),
                "pictures": {split: len(p) for split, p in splits.items()},
            }

        facts = dict(zip(data, pool.map(specialize, recipe.tasks)))
    summary = {"format": FORMAT, "seed": seed, "tasks": facts}
    (folder / "suite.json").write_text(json.dumps(summary, indent=1) + "\n")


def _mixture(known: tuple[Task, ...], recipe: Recipe, seed: int) -> Pictures:
    """Tame pictures of every class, labelled by the place of the class among all."""
    parts, offset = [], 0
    for task in known:
        count = recipe.tame_per_class * len(task.classes)
        part = tame_pictures(task, count, seed, wildest=recipe.wildest)
        parts.append(Pictures(part.images, part.labels + offset))
        offset += len(task.classes)
    images = np.concatenate([part.images for part in parts])
    return Pictures(images, np.concatenate([part.labels for part in parts]))


def _write_pictures(folder: Path, task: Task, splits: Mapping[Split, Pictures]) -> None:
    """Parquet files that ``datasets.load_dataset(folder, split=...)`` reads."""
    folder.mkdir(parents=True)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(task.classes))
    )
    for split, pictures in splits.items():
        images = [{"bytes": _png(image), "path": None} for image in pictures.images]
        columns = {"image": images, "label": pictures.labels}
        table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()
