"""Model suites to measure on: directories of local CLIP towers and parquet data, as host pools."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from torch import nn

from fusion_bench_didi.checkpoint import directory
from fusion_bench_didi.demo.folder_pools import (
    FolderCLIPVisionModelPool,
    FolderCLIPVisionModelTaskPool,
)
from fusion_bench_didi.programs.scoring import Scorer

#: Text beside the figures of a page.
NOTES = Path(__file__).with_name("notes")
DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "suite" / "real8"


class Suite:
    """The pools of one suite, images decoded once.

    Args:
        name: a directory, ``demo``, or None for the default suite beside the repository.
        split: images to score on; nothing may be chosen on ``test``.
    """

    def __init__(self, name: str | None, *, split: str = "test"):
        if name == "demo":
            from fusion_bench_didi.demo.suite import build_suite

            root = build_suite()
        else:
            root = Path(name) if name else DEFAULT
        self.label = name or "real8"
        self.modelpool: CLIPVisionModelPool = FolderCLIPVisionModelPool(root=str(root))
        self.taskpool: CLIPVisionModelTaskPool = FolderCLIPVisionModelTaskPool(
            root=str(root),
            split=split,
            decode_once=True,
            dataloader_kwargs={"batch_size": 256},
        )
        self.scorer = Scorer(self.taskpool)

    @property
    def tasks(self) -> list[str]:
        return self.modelpool.model_names

    def accuracy(
        self, model: nn.Module, tasks: list[str] | None = None
    ) -> dict[str, float]:
        """Accuracy per task, by the host's own evaluation."""
        return {task: self.scorer.score(model, task) for task in tasks or self.tasks}

    def individuals(self) -> dict[str, float]:
        """Each fine-tuned model on its own task."""
        scores: dict[str, float] = {}
        for task in self.tasks:
            scores |= self.accuracy(self.modelpool.load_model(task), [task])
        return scores


def mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def retention(scores: dict[str, float], reference: dict[str, float]) -> float:
    """Mean over tasks of accuracy over fine-tuned accuracy."""
    return sum(scores[t] / reference[t] for t in reference) / len(reference)


def machine() -> dict[str, str | int]:
    """What a figure depends on besides the code."""
    packages = ("torch", "transformers", "fusion-bench")
    return {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **{package: version(package) for package in packages},
    }


def in_words(found: dict[str, str | int]) -> str:
    """What :func:`machine` found, for a page."""
    return ", ".join(f"{name} {value}" for name, value in found.items())


def write_json(path: Path, value: object) -> None:
    """A record that appears whole, in a directory that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    directory.write_json(path, value)
