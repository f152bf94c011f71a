"""One row of the comparison over widths: merge, account, and score; runs in a process of its own."""

import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModel

from benchmarks.suites import retention
from benchmarks.wide_images import Images
from benchmarks.wide_training import accuracy
from fusion_bench_didi.demo.folder_pools import FolderCLIPVisionModelPool
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.pools.opening import load_backbone
from fusion_bench_didi.programs.entries import Entry, composed
from fusion_bench_didi.programs.sizes import PoolFacts, model_size, pool_facts


@dataclass(frozen=True)
class Row:
    """A method with settings; rows of one family and dial value are candidates, of which validation images choose.

    Args:
        family: what is joined to a curve.
        dial: where on the curve.
        method: name of its configuration.
        overrides: put into it.
    """

    family: str
    dial: str
    method: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        settings = ",".join(f"{k}={v}" for k, v in self.overrides.items())
        return f"{self.method}[{settings}]"

    def config(self) -> dict[str, Any]:
        """The whole configuration of the method."""
        return {**_stock(self.method), **self.overrides}


@cache
def _stock(method: str) -> dict[str, Any]:
    return composed(Entry(method, method, method, "dynamic"))


#: Budgets of the default; those around 99 % first.
BUDGETS = (0.08, 0.12, 0.06, 0.17, 0.04, 0.1, 0.26, 0.03, 0.02, 0.015, 0.01)


def _didi(budgets: tuple[float, ...]) -> list[Row]:
    return [Row("DiDi", f"{b:g}", "didi", {"budget": b}) for b in budgets]


def _dare(drop: float, gains: tuple[float, ...], **form: Any) -> list[Row]:
    family = "DARE, 16 bits" if "positions" in form else "DARE, 4 bits"
    return [
        Row(family, f"{drop:.0%}", "didi/dare", {"drop": drop, **form, "gain": gain})
        for gain in gains
    ]


def _compeft(density: float, *alphas: float) -> list[Row]:
    return [
        Row("ComPEFT", f"{density:.0%}", "didi/compeft", {"density": density, "alpha": a})
        for a in alphas
    ]  # fmt: skip


def _t_switch(drop: float) -> list[Row]:
    return [
        Row("T-Switch", f"{drop:.0%}", "didi/t_switch", {"drop": drop, "norm": norm})
        for norm in ("kept", "whole")
    ]


def _ultra(drop: float) -> list[Row]:
    settings = {"drop": drop, "tensors": "all"}
    return [Row("UltraDelta", f"{drop:.0%}", "didi/ultra_delta", settings)]


def _come(bits: float) -> list[Row]:
    settings = {"bits": bits, "tensors": "matrices", "others": "bfloat16"}
    return [Row("Delta-CoMe", f"{bits:g} bits", "didi/delta_come", settings)]


def _tvq(width: int, **base: int) -> list[Row]:
    family = "RTVQ" if base else "TVQ"
    return [Row(family, f"{width} bits", "didi/tvq", {"width": width, **base})]


def _tsv(fraction: float | None) -> list[Row]:
    settings = {} if fraction is None else {"rank_fraction": fraction}
    return [Row("TSV-C", "1/8" if fraction is None else f"{fraction:g}", "didi/tsv_c", settings)]  # fmt: skip


def rows(budgets: tuple[float, ...] = BUDGETS, rivals: bool = True) -> list[Row]:
    """Every row, those first that the question needs most."""
    found = _didi(budgets)
    if not rivals:
        return found
    first = (
        _dare(0.9, (1.0, 0.7), width=4)
        + _dare(0.95, (1.0, 0.7), width=4)
        + _dare(0.8, (1.0,), width=4)
        + [Row("BitDelta", "", "didi/bitdelta", {"others": "bfloat16"})]
        + _t_switch(0.9)
        + _t_switch(0.6)
        + _compeft(0.1, 4.0, 6.0)
        + _compeft(0.4, 2.0)
        + _come(1.0)
        + _ultra(0.9)
        + [Row("UltraDelta, linear", "97%", "didi/ultra_delta", {"drop": 0.97})]
        + _tvq(3)
        + _tvq(2)
        + [Row("Averaging", "", "simple_average")]
    )
    second = (
        _dare(0.5, (1.0,), width=4)
        + _dare(0.99, (1.0, 0.5), width=4)
        + _come(0.5)
        + _come(2.0)
        + _ultra(0.97)
        + _tvq(2, base_width=3)
        + _t_switch(0.8)
        + _compeft(0.2, 3.0, 5.0)
        + _tsv(None)
        + [
            Row("EMR", "", "didi/emr"),
            Row("TALL + TIES", "", "didi/tall_mask"),
            Row("FREE", "", "didi/free"),
            Row("Twin-Merging", "", "didi/twin"),
        ]
        + _dare(0.9, (1.0,), positions="stored")
        + _dare(0.95, (1.0, 0.7), positions="stored")
        + _dare(0.99, (1.0, 0.5), positions="stored")
    )
    return [row for pair in zip(found, first) for row in pair] + [
        row for row in found[len(first) :] + first[len(found) :] + second
    ]


@cache
def _facts(root: Path) -> PoolFacts:
    pool = FolderCLIPVisionModelPool(root=str(root))
    return pool_facts(pool, load_backbone(pool))


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
