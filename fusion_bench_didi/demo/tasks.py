"""The eight tasks, what pre-training sees beside them, and how pictures are drawn up.

Seven tasks are painted; ``digits`` is real handwriting from scikit-learn, of which
pre-training sees the printed relatives only. The base model therefore knows the name
of every class, from tame pictures, and has seen no picture of any task.
"""

import zlib
from dataclasses import dataclass
from typing import Callable, Mapping

import numpy as np
from numpy.random import Generator
from PIL import Image
from sklearn.datasets import load_digits

from ..errors import SettingsError
from ..options import Split
from . import painters, scenes
from .drawing import SIDE


@dataclass(frozen=True)
class Task:
    """A classification task: its name, its classes, and who paints its pictures."""

    name: str
    classes: tuple[str, ...]
    paint: Callable[[Generator, int, float], np.ndarray]

    @property
    def classnames(self) -> list[str]:
        """Class names as the host knows them; each is one token of the text tower."""
        return [f"{self.name}/{name}" for name in self.classes]


@dataclass(frozen=True)
class Pictures:
    """Pictures (n, 32, 32, 3) uint8 and their labels (n,) int64."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


TASKS = (
    Task("digits", ("zero", *painters.NUMBERS[:9]), painters.paint_digit),
    Task("letters", painters.LETTERS, painters.paint_letter),
    Task("shapes", tuple(painters.SHAPES), painters.paint_shape),
    Task("textures", painters.TEXTURES, painters.paint_texture),
    Task("signs", scenes.SIGNS, scenes.paint_sign),
    Task("counts", painters.COUNTS, painters.paint_count),
    Task("faces", scenes.FACES, scenes.paint_face),
    Task("clocks", scenes.HOURS, scenes.paint_clock),
)

EXTRAS = (
    Task("greek", tuple(painters.GREEK), painters.paint_greek),
    Task("colors", tuple(painters.COLORS), painters.paint_color),
    Task("arrows", painters.HEADINGS, painters.paint_arrow),
)
"""Seen in pre-training only, so that the base knows more than the tasks ask for."""

WILD = (0.55, 0.9)
"""Range of wildness of the tasks' pictures."""


def rng_for(seed: int, *purpose: str) -> Generator:
    """A generator of its own for each purpose: no draw depends on what came before."""
    return np.random.default_rng([seed, *(zlib.crc32(p.encode()) for p in purpose)])


def _balanced(rng: Generator, count: int, classes: int) -> np.ndarray:
    return rng.permutation(np.arange(count, dtype=np.int64) % classes)


def tame_pictures(task: Task, count: int, seed: int, *, wildest: float) -> Pictures:
    """Pictures for pre-training: every wildness from none to ``wildest``."""
    rng = rng_for(seed, "tame", task.name)
    labels = _balanced(rng, count, len(task.classes))
    wildness = rng.uniform(0, wildest, count)
    images = [task.paint(rng, int(k), float(w)) for k, w in zip(labels, wildness)]
    return Pictures(np.stack(images), labels)


def task_pictures(
    task: Task, sizes: Mapping[Split, int], seed: int
) -> dict[Split, Pictures]:
    """The splits of a task, disjoint by construction."""
    if task.name == "digits":
        return _handwritten(sizes, seed)
    splits: dict[Split, Pictures] = {}
    for split, count in sizes.items():
        rng = rng_for(seed, "wild", task.name, split)
        labels = _balanced(rng, count, len(task.classes))
        images = [task.paint(rng, int(k), float(rng.uniform(*WILD))) for k in labels]
        splits[split] = Pictures(np.stack(images), labels)
    return splits


def _handwritten(sizes: Mapping[Split, int], seed: int) -> dict[Split, Pictures]:
    """scikit-learn's 1797 handwritten digits, dealt out once, enlarged from 8 to 32 px."""
    digits = load_digits()
    order = rng_for(seed, "wild", "digits").permutation(len(digits.target))
    shares = np.cumsum([0, *sizes.values()])
    if shares[-1] > len(order):
        raise SettingsError(
            f"digits: {shares[-1]} pictures asked for, scikit-learn has {len(order)}. "
            "Ask for fewer in the sizes of the suite."
        )
    gray = (digits.images * (255 / 16)).round().astype(np.uint8)
    splits: dict[Split, Pictures] = {}
    for split, start, stop in zip(sizes, shares[:-1], shares[1:]):
        chosen = order[start:stop]
        enlarged = [
            np.asarray(
                Image.fromarray(gray[i]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            )
            for i in chosen
        ]
        images = np.repeat(np.stack(enlarged)[..., None], 3, axis=-1)
        splits[split] = Pictures(images, digits.target[chosen].astype(np.int64))
    return splits
