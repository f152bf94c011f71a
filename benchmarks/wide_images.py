"""Images of a suite as tensors, and their augmentation where they lie."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import parquet
from torch import Tensor

SPLITS = ("train", "validation", "test")
MEAN, STD = 0.5, 0.25


@dataclass(frozen=True)
class Images:
    """One split of one task: pixels (N, 3, 32, 32) uint8 and labels (N,)."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: str) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))


def read_split(suite: Path, task: str, split: str, threads: int = 8) -> Images:
    """All images of a split, decoded once."""
    (file,) = (suite / "data" / task).glob(f"{split}-*.parquet")
    table = parquet.read_table(file)

    def decoded(row: dict) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))

    with ThreadPoolExecutor(threads) as pool:
        arrays = list(pool.map(decoded, table.column("image").to_pylist()))
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(table.column("label").to_pylist()))


def read_images(suite: Path) -> dict[str, dict[str, Images]]:
    """Images per task and split."""
    return {
        task: {split: read_split(suite, task, split) for split in SPLITS}
        for task in class_names(suite)
    }


def class_names(suite: Path) -> dict[str, list[str]]:
    described = json.loads((suite / "tasks.json").read_text())
    return {task: facts["classnames"] for task, facts in described.items()}


def normalized(pixels: Tensor) -> Tensor:
    """Pixels as the processor of the suite gives them."""
    return (pixels.float() / 255 - MEAN) / STD


def moved(images: Tensor, shift: float, scale: float, mirror: bool) -> Tensor:
    """Every image shifted and scaled by draws of its own, in parts of its side, and mirrored or not."""
    n, device = len(images), images.device
    size = torch.exp((2 * torch.rand(n, device=device) - 1) * scale)
    sign = torch.ones(n, device=device)
    if mirror:
        sign = torch.where(torch.rand(n, device=device) < 0.5, -sign, sign)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = size * sign, size
    theta[:, :, 2] = (2 * torch.rand(n, 2, device=device) - 1) * 2 * shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def recolored(images: Tensor, strength: float) -> Tensor:
    """Every image with another brightness, contrast and tint."""
    n, device = len(images), images.device
    gain = 1 + strength * (2 * torch.rand(n, 1, 1, 1, device=device) - 1)
    offset = strength * torch.randn(n, 1, 1, 1, device=device)
    tint = 0.5 * strength * torch.randn(n, 3, 1, 1, device=device)
    return images * gain + offset + tint


def strong(images: Tensor) -> Tensor:
    """For distillation: moved, recolored, half of them mixed with another image, some noisy."""
    images = recolored(moved(images, 0.15, 0.35, mirror=True), 0.4)
    n, device = len(images), images.device
    part = torch.rand(n, 1, 1, 1, device=device) * 0.5
    part = part * (torch.rand_like(part) < 0.5)
    images = (1 - part) * images + part * images.roll(1, 0)
    noise = 0.3 * (torch.rand(n, 1, 1, 1, device=device) - 0.5).clamp(min=0)
    return images + noise * torch.randn_like(images)
