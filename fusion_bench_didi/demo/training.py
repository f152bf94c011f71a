"""Pre-training and fine-tuning on tensors in memory, the same to the bit from a seed.

Every training runs on single-threaded operators, and parallelism comes from whole
trainings side by side (or, in pre-training, from two half batches side by side), so the
weights do not depend on the number of threads. Nothing draws from a global generator.
"""

import math
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from .tasks import Pictures
from .towers import pixel_values


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: one-cycle AdamW."""

    steps: int
    batch: int
    rate: float
    decay: float = 0.05
    shift: int = 0  # augmentation: pictures move by up to so many pixels

    def rate_at(self, step: int) -> float:
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return self.rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.rate * 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def side_by_side(workers: int) -> Iterator[Executor]:
    """Threads whose torch operators are single-threaded; torch releases the GIL in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def image_features(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """Normalised image embeddings (n, d), as the host's classifier computes them."""
    pooled = clip.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(clip.visual_projection(pooled), dim=-1)


def text_features(clip: CLIPModel, input_ids: Tensor) -> Tensor:
    """Normalised text embeddings (n, d), as the host's classifier computes them."""
    pooled = clip.text_model(input_ids=input_ids).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1)


def _batches(
    pictures: Pictures, schedule: Schedule, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """``schedule.steps`` shuffled batches of moved pictures, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = map(torch.from_numpy, (pictures.images, pictures.labels))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(schedule.steps):
        if len(order) < schedule.batch:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        chosen, order = order[: schedule.batch], order[schedule.batch :]
        pixels = pixel_values(images[chosen])
        if schedule.shift:
            reach = (schedule.shift,) * 4
            down, right = torch.randint(
                2 * schedule.shift + 1, (2,), generator=generator
            ).tolist()
            side = pixels.shape[-1]
            pixels = F.pad(pixels, reach, mode="replicate")
            pixels = pixels[..., down : down + side, right : right + side]
        yield pixels, labels[chosen]


def _optimize(
    parameters: list[nn.Parameter],
    schedule: Schedule,
    gradients: Callable[[int], list[Tensor]],
) -> None:
    """AdamW over ``schedule``; ``gradients(step)`` are those of ``parameters``."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=schedule.rate,
        betas=(0.9, 0.95),
        weight_decay=schedule.decay,
    )
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        for parameter, gradient in zip(parameters, gradients(step)):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def pretrain(
    clip: CLIPModel,
    pictures: Pictures,
    classes: int,
    schedule: Schedule,
    seed: int,
    pool: Executor,
) -> Tensor:
    """Train the vision side against learned class embeddings; returns them, (classes, d).

    The contrast is with every class name of every task, as in CLIP's own training, and
    not only with those of the picture's own task: the two halves of a batch are computed
    side by side and their gradients added in a fixed order.
    """
    generator = torch.Generator().manual_seed(seed)
    width = clip.config.projection_dim
    words = nn.Parameter(torch.randn(classes, width, generator=generator))
    scale = clip.logit_scale.detach().exp()
    tower = [*clip.vision_model.parameters(), *clip.visual_projection.parameters()]
    parameters = [words, *tower]

    def half(pixels: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = scale * image_features(clip, pixels) @ F.normalize(words, dim=-1).T
        return torch.autograd.grad(F.cross_entropy(logits, labels) / 2, parameters)

    batches = _batches(pictures, schedule, seed)

    def gradients(step: int) -> list[Tensor]:
        pixels, labels = next(batches)
        halves = list(pool.map(half, pixels.chunk(2), labels.chunk(2)))
        return [first + second for first, second in zip(*halves)]

    _optimize(parameters, schedule, gradients)
    return words.detach()


def fine_tune(
    clip: CLIPModel, words: Tensor, pictures: Pictures, schedule: Schedule, seed: int
) -> None:
    """Train the vision tower alone; the heads are ``words`` (classes, d), fixed."""
    scale = clip.logit_scale.detach().exp()
    parameters = list(clip.vision_model.parameters())
    batches = _batches(pictures, schedule, seed)

    def gradients(step: int) -> list[Tensor]:
        pixels, labels = next(batches)
        logits = scale * image_features(clip, pixels) @ words.T
        return list(torch.autograd.grad(F.cross_entropy(logits, labels), parameters))

    _optimize(parameters, schedule, gradients)


@torch.no_grad()
def accuracy(clip: CLIPModel, words: Tensor, pictures: Pictures) -> float:
    """Share of pictures whose nearest class embedding is the right one."""
    pixels = pixel_values(torch.from_numpy(pictures.images))
    found = torch.cat(
        [image_features(clip, part) @ words.T for part in pixels.split(256)]
    )
    return (found.argmax(-1) == torch.from_numpy(pictures.labels)).float().mean().item()
