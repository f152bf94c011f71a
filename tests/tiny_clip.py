"""The model of most tests: a CLIP vision tower of two layers and what stands for its fine-tunings."""

import copy
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

# Names for which the host has class names and prompt templates.
TASKS = ("mnist", "svhn", "eurosat")


@dataclass(frozen=True)
class TinyClip:
    """A base vision tower and what stands for its fine-tunings, one per task."""

    base: CLIPVisionModel
    tuned: dict[str, CLIPVisionModel]

    @property
    def tasks(self) -> list[str]:
        return list(self.tuned)

    def pool_models(self) -> dict[str, CLIPVisionModel]:
        """The mapping that the host's model pools take as ``models``."""
        return {"_pretrained_": self.base, **self.tuned}

    def save(self, directory: Path) -> Path:
        """One ``from_pretrained`` directory per model, named as in the pool."""
        for name, model in self.pool_models().items():
            # transformers 5 writes keys without the prefix of hub checkpoints, which
            # transformers 4 then silently leaves at their random values.
            tensors = {
                "vision_model." + key.removeprefix("vision_model."): value.contiguous()
                for key, value in model.state_dict().items()
            }
            model.config.save_pretrained(directory / name)
            file = directory / name / "model.safetensors"
            save_file(tensors, file, metadata={"format": "pt"})
        return directory


def _generator(*words: object) -> torch.Generator:
    """Seeded by names, so that neither order nor other tensors change a tensor."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, words)).encode()))


def _task_vector(like: Tensor, generator: torch.Generator, rank: int) -> Tensor:
    """Mostly of low rank, plus a little full-rank noise, as fine-tuning leaves it."""
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim < 2:
        return noise
    m, n = like.flatten(1).shape
    left = torch.randn(m, rank, generator=generator)  # (m, r)
    right = torch.randn(rank, n, generator=generator)  # (r, n)
    return (left @ right).view_as(like) / rank**0.5 + 0.1 * noise


def build_tiny_clip(
    tasks: tuple[str, ...] = TASKS, *, scale: float = 0.01, rank: int = 2, seed: int = 0
) -> TinyClip:
    """2 layers of width 32 on 32 px images in patches of 8; every float tensor is changed."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = CLIPVisionModel(config).eval()
    tuned = {}
    for task in tasks:
        tuned[task] = copy.deepcopy(base)
        with torch.no_grad():
            for name, value in tuned[task].named_parameters():
                # the same under transformers 5, whose names lack the prefix
                whole = "vision_model." + name.removeprefix("vision_model.")
                generator = _generator(seed, task, whole)
                value += scale * _task_vector(value, generator, rank)
    return TinyClip(base, tuned)
