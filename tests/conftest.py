"""What all tests share: one thread, no network, and small models.

``tiny_clip``       a base vision tower and three fine-tuned ones, in memory, fresh for each test
``make_tiny_clip``  the function behind it, for other tasks, sizes of the change, or seeds
``tiny_clip_dir``   the same models as ``from_pretrained`` directories, one for the whole session: read only
``suite_real8``     path of the measuring suite; skips where it is absent
``run_python``      runs code in a fresh interpreter
"""

import os

from helpers import write_clip

# Read at import by the libraries below: must come first.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import gc
import logging
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fusion_bench.tasks.clip_classification import CLIPTemplateFactory
from helpers import REPOSITORY
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: no test looks through half a million objects for garbage."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def make_tiny_clip() -> Callable[..., TinyClip]:
    return build_tiny_clip


@pytest.fixture
def tiny_clip() -> TinyClip:
    return build_tiny_clip()


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip().save(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def clip_dir(make_tiny_clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP around the tiny tower, as the host's task pool loads it."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip", make_tiny_clip().base)


@pytest.fixture(scope="session")
def demo_suite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the smallest demo suite lies, as its pools take it."""
    from fusion_bench_didi.demo import build_suite

    cache = tmp_path_factory.mktemp("suite")
    build_suite(cache, size="tiny")
    return {"cache_dir": str(cache), "size": "tiny"}


@pytest.fixture(autouse=True)
def class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's class names are for the whole process; suites that bring tasks of the same names replace them."""
    known = dict(CLIPTemplateFactory._dataset_mapping)
    monkeypatch.setattr(CLIPTemplateFactory, "_dataset_mapping", known)


#: What is logged, as imports leave it.
LEVELS = {n: logging.getLogger(n).level for n in (None, "fusion_bench_didi")}


@pytest.fixture(autouse=True)
def loudness() -> None:
    """The command sets what the whole process logs, also where a fixture of a module runs it."""
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def suite_real8() -> Path:
    path = REPOSITORY.parent / "shared" / "suite" / "real8"
    if not path.is_dir():
        pytest.skip(f"the measuring suite is not part of the repository: no {path}")
    return path


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """A fresh interpreter: what is imported, or patched, here does not count there."""

    def run(code: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True)

    return run
