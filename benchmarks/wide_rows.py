"""One row of the comparison over widths: merge, account, and score; runs in a process of its own."""

import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModel

from benchmarks.few_bit_rows import Row
from benchmarks.suites import retention
from benchmarks.wide_images import Images
from benchmarks.wide_training import accuracy
from fusion_bench_didi.demo.folder_pools import FolderCLIPVisionModelPool
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.pools.opening import load_backbone, open_pool
from fusion_bench_didi.programs.sizes import PoolFacts, facts_of, model_size


@cache
def _facts(root: Path) -> PoolFacts:
    pool = FolderCLIPVisionModelPool(root=str(root))
    backbone = load_backbone(pool)
    return facts_of(open_pool(pool, backbone), backbone)


class Scoring:
    """Images, classifiers and tower of a suite on a device.

    Args:
        root: the suite.
        images: per task and split.
        heads: zero-shot classifiers per task.
    """

    def __init__(
        self,
        root: Path,
        images: Mapping[str, Mapping[str, Images]],
        heads: Mapping[str, Tensor],
        device: str,
    ):
        clip = CLIPModel.from_pretrained(root / "clip")
        self.projection = clip.visual_projection.weight.detach().to(device)
        self.tower = CLIPVisionModel(clip.config.vision_config).to(device)
        self.heads = {task: head.to(device) for task, head in heads.items()}
        self.images, self.device = images, device

    def score(self, model: nn.Module, task: str, splits: tuple[str, ...]) -> dict[str, float]:  # fmt: skip
        """Accuracy of the model on a task's splits; a dynamic one is made that task's where it was merged."""
        if isinstance(model, DynamicModel):
            model.set_task(task)
            model = model.backbone
        self.tower.load_state_dict(_as_vision_model(model))
        return {
            split: accuracy(
                self.tower,
                self.projection,
                self.heads[task],
                self.images[task][split].to(self.device),
            )
            for split in splits
        }


def _as_vision_model(model: nn.Module) -> dict[str, Tensor]:
    prefix = "" if isinstance(model, CLIPVisionModel) else "vision_model."
    return {prefix + name: value for name, value in model.state_dict().items()}


def measure(
    row: Row,
    config: Mapping[str, Any],
    root: Path,
    scoring: Scoring,
    reference: Mapping[str, Mapping[str, float]],
    device: str = "cpu",
) -> dict[str, Any]:
    """What a row keeps and stores; the error's words where it fails.

    Args:
        reference: accuracy of fine-tuned towers per split and task.
        device: to merge on.
    """
    import lightning as L

    found = asdict(row) | {"key": row.key}
    begun = time.perf_counter()
    try:
        torch.manual_seed(0)
        pool = FolderCLIPVisionModelPool(root=str(root))
        method = instantiate(OmegaConf.create(dict(config)))
        if hasattr(method, "_fabric_instance"):
            method._fabric_instance = L.Fabric(accelerator=device, devices=1)
        model = method.run(pool)
        found["seconds"] = time.perf_counter() - begun
        backbone = load_backbone(pool)
        found["x"] = model_size(model, backbone, _facts(root)).x_excl
        info = vars(model).get("info") or {}
        found["error"] = info.get("relative_error")
        splits = ("test", "validation")
        scores = {t: scoring.score(model, t, splits) for t in reference["test"]}
        for split in splits:
            of_split = {task: value[split] for task, value in scores.items()}
            found[split] = of_split
            kept = 100 * retention(of_split, reference[split])
            found["retention" if split == "test" else "validation_retention"] = kept
    except Exception as failure:
        found["failed"] = f"{type(failure).__name__}: {failure}"
        found["traceback"] = traceback.format_exc().splitlines()[-6:]
    return found
