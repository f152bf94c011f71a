"""Model suites to measure on: directories of local CLIP towers and parquet data, as host pools."""

import json
from pathlib import Path
from typing import Any

import torch
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from torch import nn
from torch.utils.data import DataLoader

from fusion_bench_didi.demo import register_tasks

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "suite" / "real8"


class Suite:
    """A directory with ``clip/``, ``vision/``, ``data/`` and the class names of its tasks.

    Args:
        root: the directory.
        split: which images to score on; nothing may be chosen on ``test``.
    """

    def __init__(self, root: Path, *, split: str = "test"):
        if not (root / "clip").is_dir():
            raise FileNotFoundError(
                f"{root} holds no suite (no clip/ in it). Give one with --suite, or --suite demo."
            )
        self.root, self.split = root, split
        self.classes = class_names(root)
        self.tasks = list(self.classes)
        register_tasks(self.classes)

    def modelpool(self) -> CLIPVisionModelPool:
        vision = self.root / "vision"
        return CLIPVisionModelPool(
            {name: str(vision / name) for name in ("_pretrained_", *self.tasks)},
            processor=str(self.root / "clip"),
        )

    def taskpool(self) -> CLIPVisionModelTaskPool:
        """The host's own pool, unmodified; images are decoded once instead of once per evaluation."""
        from datasets import load_dataset

        datasets = {
            task: load_dataset(str(self.root / "data" / task), split=self.split)
            for task in self.tasks
        }
        pool = CLIPVisionModelTaskPool(
            test_datasets=datasets,
            processor=str(self.root / "clip"),
            clip_model=str(self.root / "clip"),
            dataloader_kwargs={"batch_size": 256},
        )
        pool.setup()
        pool.test_dataloaders = {
            task: _decoded(loader) for task, loader in pool.test_dataloaders.items()
        }
        return pool


def class_names(root: Path) -> dict[str, list[str]]:
    """Class tokens per task, from ``tasks.json`` or the embedded suite's ``suite.json``."""
    file = root / "tasks.json"
    tasks = json.loads((file if file.is_file() else root / "suite.json").read_text())
    tasks = tasks.get("tasks", tasks)
    return {name: entry["classnames"] for name, entry in tasks.items()}


def open_suite(name: str | None, *, split: str = "test") -> Suite:
    """``demo``, a path, or the default suite beside the repository."""
    if name == "demo":
        from fusion_bench_didi.demo import build_suite

        return Suite(build_suite(), split=split)
    return Suite(Path(name) if name else DEFAULT, split=split)


def accuracies(report: dict[str, Any], tasks: list[str]) -> dict[str, float]:
    return {task: report[task]["accuracy"] for task in tasks}


def individuals(suite: Suite, taskpool: CLIPVisionModelTaskPool) -> dict[str, float]:
    """Each fine-tuned model on its own task."""
    return {
        task: single(taskpool, suite.modelpool().load_model(task), task)
        for task in suite.tasks
    }


def single(taskpool: CLIPVisionModelTaskPool, model: nn.Module, task: str) -> float:
    """One model on one task of the pool."""
    loaders = taskpool.test_dataloaders
    taskpool.test_dataloaders = {task: loaders[task]}
    try:
        return taskpool.evaluate(model)[task]["accuracy"]
    finally:
        taskpool.test_dataloaders = loaders


@torch.no_grad()
def _decoded(loader: DataLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images, labels) for images, labels in loader]
