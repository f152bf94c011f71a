"""What all tests share: one thread, no network, and small models.

``tiny_clip``       a base vision tower and three fine-tuned ones, in memory, fresh for each test
``make_tiny_clip``  the function behind it, for other tasks, sizes of the change, or seeds
``tiny_clip_dir``   the same models as ``from_pretrained`` directories, one for the whole session: read only
``suite_real8``     path of the measuring suite; skips where it is absent
``run_python``      runs code in a fresh interpreter

Fixtures import what they need: the process that hands tests to others reads this file too, before any of them starts.
"""

import copy
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fusion_bench_didi  # noqa: F401  loads nothing, and puts back names that the host asks for

if TYPE_CHECKING:
    from tiny_clip import TinyClip

# Read at import by torch, transformers, datasets and tokenizers.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

#: What is logged, as imports leave it.
LEVELS: dict[str | None, int] = {}


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: no test looks through half a million objects for garbage."""
    libraries = ("lightning", "lightning.fabric", "lightning.pytorch")
    for name in (None, "fusion_bench_didi", *libraries):
        LEVELS[name] = logging.getLogger(name).level
    gc.collect()
    gc.freeze()
    # to count them takes as long as to look through them
    gc.get_freeze_count = lambda: 1


@pytest.fixture(scope="session")
def make_tiny_clip() -> "Callable[..., TinyClip]":
    from tiny_clip import build_tiny_clip

    return build_tiny_clip


@pytest.fixture
def tiny_clip(make_tiny_clip) -> "TinyClip":
    return make_tiny_clip()


@pytest.fixture(scope="session")
def tiny_clip_dir(make_tiny_clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip().save(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def clip_dir(make_tiny_clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP around the tiny tower, as the host's task pool loads it."""
    from helpers import write_clip

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
    from fusion_bench.tasks.clip_classification import CLIPTemplateFactory

    known = dict(CLIPTemplateFactory._dataset_mapping)
    monkeypatch.setattr(CLIPTemplateFactory, "_dataset_mapping", known)


#: Configurations of methods by what they were composed of.
COMPOSED: dict[tuple, Any] = {}


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method's configuration is composed once in a process: Hydra takes a sixth of a second for it."""
    entries = sys.modules.get("fusion_bench_didi.programs.entries")
    if entries is None:
        return
    stock = entries._compose

    def compose(name: str, parts: Mapping[str, str]) -> Any:
        key = (name, *parts.items(), *entries.search_path())
        if key not in COMPOSED:
            COMPOSED[key] = stock(name, parts)
        return copy.deepcopy(COMPOSED[key])

    monkeypatch.setattr(entries, "_compose", compose)


@pytest.fixture(autouse=True)
def loudness() -> None:
    """The command sets what the whole process logs, also where a fixture of a module runs it."""
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def suite_real8() -> Path:
    from helpers import REPOSITORY

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
