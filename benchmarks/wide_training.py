"""Wider towers for a suite: a base distilled from the suite's own, and a fine-tuned tower per task.

The suite's pre-training images are not part of it, so that a wider base is a reconstruction: trained, without labels,
to give the same embeddings as the suite's base on the tasks' training images under strong augmentation.
"""

import io
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, CLIPVisionConfig, CLIPVisionModel

SPLITS = ("train", "validation", "test")
#: tasks whose images mean the same in a mirror
MIRRORED = ("scenes15", "cars_body", "ucmerced", "dtd10", "fashion_mnist")
MEAN, STD = 0.5, 0.25


@dataclass(frozen=True)
class Images:
    """One split of one task: pixels (N, 3, 32, 32) uint8 and labels (N,)."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: str) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Recipe:
    """How towers are trained; rates are those of width 256 and go with its inverse."""

    distill_steps: int = 4000
    distill_batch: int = 512
    distill_rate: float = 1e-3
    tune_steps: int = 500
    tune_batch: int = 128
    tune_rate: float = 3e-4
    layers: int = 4
    head_width: int = 64


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


@torch.no_grad()
def heads(suite: Path) -> dict[str, Tensor]:
    """Zero-shot classifiers (C, P) of unit rows, times the logit scale."""
    clip = CLIPModel.from_pretrained(suite / "clip")
    tokenizer = AutoTokenizer.from_pretrained(suite / "clip")
    found = {}
    for task, names in class_names(suite).items():
        tokens = tokenizer(names, return_tensors="pt", padding=True)
        text = clip.get_text_features(**tokens)
        found[task] = F.normalize(text, dim=-1) * clip.logit_scale.exp()
    return found


def embed(
    tower: nn.Module, projection: Tensor, images: Tensor, low: bool = False
) -> Tensor:
    """Unit embeddings (N, P) of normalized images; the tower runs in bfloat16 if ``low``."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
        pooled = tower(images).pooler_output
    return F.normalize(pooled.float() @ projection.T, dim=-1)


@torch.no_grad()
def accuracy(
    tower: nn.Module, projection: Tensor, head: Tensor, images: Images
) -> float:
    """Share of images whose nearest class is theirs; in float32."""
    tower.eval()
    hits = torch.zeros((), device=images.pixels.device)
    for pixels, labels in zip(images.pixels.split(1000), images.labels.split(1000)):
        logits = embed(tower, projection, normalized(pixels)) @ head.T
        hits += (logits.argmax(-1) == labels).sum()
    return float(hits) / len(images.labels)


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


def rate_at(step: int, steps: int, warm: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def train(
    modules: list[nn.Module],
    loss_of: Callable[[], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float,
    report: Callable[[int, Tensor], None] | None = None,
) -> None:
    """AdamW under a cosine, gradients clipped to length 1; no step waits for the device."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    cuda = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(
        parameters, rate, betas=(0.9, 0.98), weight_decay=decay, fused=cuda or None
    )
    warm = max(1, min(200, steps // 10))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps, warm)
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if report and (step % max(1, steps // 5) == 0 or step == steps - 1):
            report(step, loss.detach())


def wide_config(teacher: CLIPVisionConfig, width: int, recipe: Recipe):
    """The teacher's shape, wider."""
    changed = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": max(1, width // recipe.head_width),
    }
    return CLIPVisionConfig(**{**teacher.to_dict(), **changed})


def distill(
    suite: Path, pixels: Tensor, width: int, recipe: Recipe, device: str, say: Callable
) -> CLIPModel:
    """A CLIP with the suite's text side and a wider vision tower that gives the base's embeddings."""
    clip = CLIPModel.from_pretrained(suite / "clip")
    teacher = CLIPVisionModel.from_pretrained(suite / "vision" / "_pretrained_")
    teacher = teacher.to(device).eval().requires_grad_(False)
    target = clip.visual_projection.weight.detach().to(device)
    config = clip.config
    config.vision_config = wide_config(teacher.config, width, recipe)
    student = CLIPModel(config)
    student.text_model, student.text_projection = clip.text_model, clip.text_projection
    student.logit_scale.data.copy_(clip.logit_scale.data)
    student.to(device).train().requires_grad_(True)
    low = device != "cpu"  # bfloat16

    def loss_of() -> Tensor:
        chosen = torch.randint(
            len(pixels), (recipe.distill_batch,), device=pixels.device
        )
        images = strong(normalized(pixels[chosen]))
        with torch.no_grad():
            wanted = embed(teacher, target, images, low)
        given = embed(
            student.vision_model, student.visual_projection.weight, images, low
        )
        return 1 - (given * wanted).sum(-1).mean()

    train(
        [student.vision_model, student.visual_projection],
        loss_of,
        steps=recipe.distill_steps,
        rate=recipe.distill_rate * 256 / width,
        decay=0.05,
        report=lambda step, loss: say(f"distill {step}: 1 - cosine {float(loss):.4f}"),
    )
    return student.requires_grad_(False)


def fine_tune(
    base: CLIPVisionModel,
    projection: Tensor,
    head: Tensor,
    images: Images,
    recipe: Recipe,
    *,
    mirror: bool,
) -> CLIPVisionModel:
    """A copy of the base fitted to a task's labels; projection and text side stay."""
    tower = CLIPVisionModel(base.config).to(projection.device)
    tower.load_state_dict(base.state_dict())
    tower.train()

    def loss_of() -> Tensor:
        n, device = len(images.labels), images.labels.device
        chosen = torch.randint(n, (recipe.tune_batch,), device=device)
        drawn = normalized(images.pixels[chosen])
        drawn = recolored(moved(drawn, 0.06, 0.12, mirror), 0.15)
        logits = embed(tower, projection, drawn, drawn.is_cuda) @ head.T
        return F.cross_entropy(logits, images.labels[chosen])

    train(
        [tower],
        loss_of,
        steps=recipe.tune_steps,
        rate=recipe.tune_rate * 256 / base.config.hidden_size,
        decay=0.01,
    )
    return tower


def make_suite(
    suite: Path,
    root: Path,
    width: int,
    images: dict[str, dict[str, Images]],
    recipe: Recipe,
    device: str,
    say: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Train base and fine-tuned towers of a width, and write them as a suite.

    Args:
        images: per task and split, on the device.

    Returns:
        accuracy on the test split of base and fine-tuned towers, and on the validation split, per task.
    """
    torch.manual_seed(width)
    begun = time.perf_counter()
    pixels = torch.cat([splits["train"].pixels for splits in images.values()])
    clip = distill(suite, pixels, width, recipe, device, say)
    base = CLIPVisionModel(clip.config.vision_config).to(device)
    base.vision_model.load_state_dict(clip.vision_model.state_dict())
    _write(clip, suite, root)
    base.save_pretrained(root / "vision" / "_pretrained_")
    say(f"base made, {time.perf_counter() - begun:.0f} s")
    projection = clip.visual_projection.weight.detach()
    texts = {task: head.to(device) for task, head in heads(suite).items()}
    found: dict[str, dict[str, float]] = {
        name: {} for name in ("base", "individuals", "base_validation", "individuals_validation")
    }  # fmt: skip
    for task, splits in images.items():
        mirror, head = task in MIRRORED, texts[task]
        tower = fine_tune(base, projection, head, splits["train"], recipe, mirror=mirror)  # fmt: skip
        tower.save_pretrained(root / "vision" / task)
        for name, model in (("base", base), ("individuals", tower)):
            found[name][task] = accuracy(model, projection, head, splits["test"])
            part = accuracy(model, projection, head, splits["validation"])
            found[f"{name}_validation"][task] = part
        say(f"{task}: {found['base'][task]:.3f} -> {found['individuals'][task]:.3f}")
    described = {
        task: {
            "classnames": names,
            "zero_shot": found["base"][task],
            "fine_tuned": found["individuals"][task],
            "test": len(images[task]["test"].labels),
        }
        for task, names in class_names(suite).items()
    }
    (root / "tasks.json").write_text(json.dumps(described, indent=1) + "\n")
    say(f"eight towers made, {time.perf_counter() - begun:.0f} s")
    return found


def _write(clip: CLIPModel, suite: Path, root: Path) -> None:
    """The base, with the suite's tokenizer and processor; its images are linked to."""
    root.mkdir(parents=True, exist_ok=True)
    clip.save_pretrained(root / "clip")
    for file in _beside_weights(suite / "clip"):
        shutil.copyfile(file, root / "clip" / file.name)
    link = root / "data"
    if not link.exists():
        link.symlink_to((suite / "data").absolute())


def _beside_weights(directory: Path) -> Iterator[Path]:
    for file in directory.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            yield file
