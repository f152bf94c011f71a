"""A small base model of an architecture and three fine-tuned ones, in directories, merged once, and their outputs compared."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool, CausalLMPool
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from benchmarks.small_models import fine_tuned, inputs, small_model
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel

BASE, TASKS = "_pretrained_", ("all", "frozen", "bfloat16")
#: nearly everything is stored
GENEROUS = {"budget": 20.0, "factor_dtype": "float32", "refine_sweeps": 2}
TOLERANCE = 1e-3


class NotTried(Exception):
    """A column has nothing to be tried on: what it needs does not work in transformers by itself."""


@dataclass
class Bench:
    """A small base model and three fine-tuned ones, in directories.

    Args:
        kind: their class.
        pooled: as language models are pooled, by their directories alone.
    """

    kind: type[PreTrainedModel]
    place: Path
    pooled: bool

    @cached_property
    def models(self) -> dict[str, PreTrainedModel]:
        """As they were saved."""
        found = {BASE: small_model(self.kind)}
        for seed, task in enumerate(TASKS):
            tuned = copy.deepcopy(found[BASE])
            found[task] = fine_tuned(tuned, seed, frozen=task == "frozen")
            if task == "bfloat16":
                found[task] = found[task].bfloat16()
        return found

    @cached_property
    def pool(self) -> Any:
        for name, model in self.models.items():
            try:
                model.save_pretrained(self.place / name)
            except Exception as error:
                raise NotTried(f"not saved by itself: {error}") from error
        entries = {n: str(self.place / n) for n in self.models}
        if self.pooled and self.models[BASE].config.model_type in CONFIG_MAPPING:
            return CausalLMPool(entries, tokenizer=None)
        target = f"{self.kind.__module__}.{self.kind.__qualname__}.from_pretrained"
        return BaseModelPool(
            {
                n: {"_target_": target, "pretrained_model_name_or_path": p}
                for n, p in entries.items()
            }
        )

    @cached_property
    def loaded(self) -> dict[str, PreTrainedModel]:
        """As transformers reads them."""
        self.pool
        try:
            return {name: self.read(self.place / name) for name in self.models}
        except Exception as error:
            raise NotTried(f"not loaded by itself: {error}") from error

    def read(self, place: Path) -> PreTrainedModel:
        """In the base model's type, for what a class works out itself is rounded to the type that it is loaded in; transformers 5
        takes that of the files."""
        return self.kind.from_pretrained(place, dtype=torch.float32).float().eval()

    @cached_property
    def kept(self) -> set[str]:
        """Names of the tensors that transformers reads as it wrote them, but for rounding to the type that they have in memory."""
        found = set(self.loaded[BASE].state_dict())
        for name, model in self.models.items():
            read = self.loaded[name].state_dict()
            written = model.state_dict()
            found &= {n for n, v in written.items() if n in read and torch.allclose(v.double(), read[n].double(), atol=1e-3, rtol=1e-2)}  # fmt: skip
        return found

    @cached_property
    def merged(self) -> DiDiModel:
        return self.merge(**GENEROUS).eval()

    def merge(self, pool: Any = None, **settings: Any) -> Any:
        method = DiDiMerging(**{"refine_sweeps": 2, **settings})
        method._program = SimpleNamespace(taskpool=None)
        return method.run(pool or self.pool)

    @cached_property
    def comparable(self) -> bool:
        """Whether outputs may be compared: a tensor that is not read is at random."""
        if set(self.loaded[BASE].state_dict()) - self.kept:
            raise NotTried("some tensors are at random as transformers reads them")
        return True

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        """What the fine-tuned models take; the same output twice."""
        faults = []
        for found in inputs(self.loaded[BASE]):
            try:
                for model in self.loaded.values():
                    one, other = (output_of(model, found) for _ in range(2))
                    if not close(one, other):
                        raise NotTried("outputs are random")
                return found
            except NotTried as fault:
                faults.append(str(fault))
            except Exception as fault:
                faults.append(f"{type(fault).__name__}: {fault}")
        raise NotTried(f"no inputs found: {faults[:1]}")


def output_of(model: Any, batch: dict[str, Tensor], **task: Any) -> list[Tensor]:
    """Floating-point tensors of an output."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return [t for t in _tensors(model(**batch, **task)) if t.is_floating_point()]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for one in value.values() for t in _tensors(one)]
    if isinstance(value, (tuple, list)):
        return [t for one in value for t in _tensors(one)]
    return []


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative distance of two outputs."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    pairs = zip(found, expected)
    return max(((_finite(a) - _finite(b)).norm() / (_finite(b).norm() + 1e-6)).item() for a, b in pairs)  # fmt: skip


def _finite(values: Tensor) -> Tensor:
    return values.double().nan_to_num(nan=1e3, posinf=1e3, neginf=-1e3).clamp(-1e6, 1e6)


def close(found: list[Tensor], expected: list[Tensor], most: float = TOLERANCE) -> bool:
    return distance(found, expected) <= most


def same_tensors(left: Any, right: Any, names: set[str]) -> None:
    one, other = left.state_dict(), right.state_dict()
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())[:5]
    wrong = [n for n in one if n in names and not one[n].equal(other[n])]
    assert not wrong, f"{len(wrong)} tensors differ: {wrong[:4]}"
