"""What a merged model spent its storage on: ranks by layer and module, and the energy kept per layer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .style import ATTENTION, MLP, OTHER

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs: its layer (None outside the layers) and its module within the layer."""

    layer: int | None
    module: str

    @classmethod
    def of(cls, tensor: str) -> "Place":
        """By the first number in the name, as transformers, OpenCLIP and GPT-2 have it."""
        name = tensor.removesuffix(".weight")
        found = _LAYER.search(name)
        if found is None:
            return cls(None, name.rpartition(".")[2])
        return cls(int(found[1]), name[found.end() :])

    @property
    def kind(self) -> str:
        name = self.module.lower()
        if "attn" in name or "attention" in name:
            return "attention"
        if any(word in name for word in ("mlp", "fc", "ffn", "feed_forward")):
            return "MLP"
        return "other"

    @property
    def short(self) -> str:
        """A short name of a module: ``self_attn.q_proj`` -> ``q``."""
        leaf = self.module.rpartition(".")[2]
        return leaf.removesuffix("_weight").removesuffix("_proj").removeprefix("c_")


KIND_COLORS = {"attention": ATTENTION, "MLP": MLP, "other": OTHER}
_USUAL = "q k v qkv in attn out gate up fc1 fc fc2 down".split()


@dataclass(frozen=True)
class RankTable:
    """Ranks as a picture: lines are layers (and tensors outside them), columns modules, one block per part.

    Args:
        blocks: ``shared`` and the tasks.
        lines: label of each line, embeddings first.
        modules: of the layers.
        values: (blocks, lines, modules); a tensor outside the layers fills its line.
    """

    blocks: list[str]
    lines: list[str]
    modules: list[Place]
    values: np.ndarray

    @classmethod
    def of(cls, ranks: Mapping[str, Any]) -> "RankTable":
        parts = {"shared": ranks["shared"], **ranks["experts"]}
        places = {name: Place.of(name) for name in ranks["shared"]}
        modules = _modules(places.values())
        outside = sorted({p.module for p in places.values() if p.layer is None})
        layers = sorted({p.layer for p in places.values() if p.layer is not None})
        lines = [*outside, *layers]
        values = np.full((len(parts), len(lines), max(len(modules), 1)), np.nan)
        columns = {p.module: i for i, p in enumerate(modules)}
        for b, part in enumerate(parts.values()):
            for name, rank in part.items():
                place = places[name]
                if place.layer is None:
                    values[b, lines.index(place.module), :] = rank
                else:
                    values[b, lines.index(place.layer), columns[place.module]] = rank
        named = [_spaced(o) for o in outside] + [f"layer {layer}" for layer in layers]
        return cls(list(parts), named, modules, values)


def _spaced(name: str) -> str:
    return name.replace("_embedding", "").replace("_", " ") + (
        " emb." if name.endswith("_embedding") else ""
    )


def _modules(places) -> list[Place]:
    """Attention first, then MLP, then the rest; within them q, k, v, out, fc1, fc2."""
    unique = {p.module: Place(0, p.module) for p in places if p.layer is not None}

    def order(place: Place):
        usual = _USUAL.index(place.short) if place.short in _USUAL else len(_USUAL)
        return list(KIND_COLORS).index(place.kind), usual, place.module

    return sorted(unique.values(), key=order)


@dataclass(frozen=True)
class EnergyLine:
    """Energy kept of one kind of module, per line of the picture: mean over matrices and tasks, and the range of tasks."""

    kind: str
    layers: list[str]
    mean: list[float]
    low: list[float]
    high: list[float]


def energy_lines(kept: Mapping[str, Any]) -> list[EnergyLine]:
    """From energy kept per tensor and task (a list or a mapping) to a line per kind of module."""
    found: dict[str, dict[str, list[Sequence[float]]]] = {}
    for tensor, values in kept.items():
        place = Place.of(tensor)
        if place.layer is not None:
            per_task = list(values.values()) if isinstance(values, Mapping) else values
            layers = found.setdefault(place.kind, {})
            layers.setdefault(str(place.layer), []).append(per_task)
    lines = []
    for kind in filter(found.get, KIND_COLORS):
        layers = sorted(found[kind], key=int)
        tasks = [np.mean(found[kind][layer], axis=0) for layer in layers]
        ends = ([float(of(t)) for t in tasks] for of in (np.mean, np.min, np.max))
        lines.append(EnergyLine(kind, layers, *ends))
    return lines
