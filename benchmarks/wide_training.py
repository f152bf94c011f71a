"""Wider towers for a suite: a base distilled from the suite's own, and a fine-tuned tower per task.

The suite's pre-training images are not part of it, so that a wider base is a reconstruction: trained, without labels,
to give the same embeddings as the suite's base on the tasks' training images under strong augmentation.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from benchmarks.wide_images import (
    Images,
    class_names,
    moved,
    normalized,
    recolored,
    strong,
)

#: tasks whose images mean the same in a mirror
MIRRORED = ("scenes15", "cars_body", "ucmerced", "dtd10", "fashion_mnist")


@dataclass(frozen=True)
class Recipe:
    """How towers are trained; rates are those of width 256 and go with its inverse."""

    distill_steps: int = 3000
    distill_batch: int = 512
    distill_rate: float = 1e-3
    tune_steps: int = 500
    tune_batch: int = 128
    tune_rate: float = 3e-4
    layers: int = 4
    head_width: int = 64


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
