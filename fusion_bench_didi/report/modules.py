"""What a merged model spent its storage on: ranks by layer and module, and the energy kept per layer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .comparison import Comparison
from .style import ATTENTION, MLP, OTHER, RANK_COLOURS

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
        """``self_attn.q_proj`` -> ``q``."""
        leaf = self.module.rpartition(".")[2]
        return leaf.removesuffix("_weight").removesuffix("_proj").removeprefix("c_")


KIND_COLOURS = {"attention": ATTENTION, "MLP": MLP, "other": OTHER}
_USUAL = (
    "q",
    "k",
    "v",
    "qkv",
    "in",
    "attn",
    "out",
    "gate",
    "up",
    "fc1",
    "fc",
    "fc2",
    "down",
)


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
        return list(KIND_COLOURS).index(place.kind), usual, place.module

    return sorted(unique.values(), key=order)


def rank_plot(comparison: Comparison) -> Figure | None:
    """Ranks as a heat map: layer x module, a block for the shared part and one per expert."""
    row = comparison.shown_in_detail()
    if row is None:
        return None
    table = RankTable.of(row["ranks"])
    blocks, lines, modules = table.values.shape
    gap = 0.6
    picture, axes = plt.subplots(
        figsize=(max(6.0, 1.8 + 0.2 * blocks * modules), 1.3 + 0.3 * lines)
    )
    most = max(np.nanmax(table.values), 1)
    colours = plt.get_cmap(RANK_COLOURS)
    for b, block in enumerate(table.blocks):
        left = b * (modules + gap)
        for y in range(lines):
            cells = table.values[b, y]
            whole = y < lines - _layers(table)
            width = modules if whole else 1
            for x in range(1 if whole else modules):
                _cell(axes, left + x, y, width, cells[x], most, colours)
        for x, place in enumerate(table.modules):
            shade = KIND_COLOURS[place.kind]
            axes.add_patch(Rectangle((left + x, -0.42), 1, 0.26, color=shade, lw=0))
            axes.text(
                left + x + 0.5,
                lines + 0.12,
                place.short,
                rotation=90,
                ha="center",
                va="top",
                fontsize=6,
                color=shade,
            )
        axes.text(
            left + modules / 2,
            -0.62,
            block,
            ha="center",
            va="bottom",
            fontsize=8,
            fontweight="bold" if b == 0 else "normal",
        )
    axes.set_xlim(-0.1, blocks * (modules + gap) - gap + 0.1)
    axes.set_ylim(lines + 0.9, -1.3)
    axes.set_yticks([y + 0.5 for y in range(lines)], table.lines, fontsize=7)
    axes.set_xticks([])
    axes.grid(False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    scale = plt.cm.ScalarMappable(plt.Normalize(0, most), colours)
    picture.colorbar(scale, ax=axes, label="rank", fraction=0.02, pad=0.01)
    axes.set_title(f"Ranks of {row['method']}", pad=14)
    handles = [
        Rectangle((0, 0), 1, 1, color=KIND_COLOURS[k], label=k)
        for k in dict.fromkeys(p.kind for p in table.modules)
    ]
    axes.legend(
        handles=handles,
        loc="upper right",
        ncols=3,
        fontsize=7,
        bbox_to_anchor=(1, 1.16),
        borderaxespad=0,
    )
    return picture


def _layers(table: RankTable) -> int:
    return sum(line.startswith("layer ") for line in table.lines)


def _cell(axes, x, y, width, value, most, colours) -> None:
    if np.isnan(value):
        return
    axes.add_patch(
        Rectangle(
            (x, y), width, 1, facecolor=colours(value / most), edgecolor="white", lw=0.8
        )
    )
    dark = value / most > 0.55
    axes.text(
        x + width / 2,
        y + 0.5,
        f"{value:.0f}",
        ha="center",
        va="center",
        fontsize=5.5,
        color="white" if dark else "#333333",
    )


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
    for kind in KIND_COLOURS:
        if kind in found:
            layers = sorted(found[kind], key=int)
            tasks = [np.mean(found[kind][layer], axis=0) for layer in layers]
            lines.append(
                EnergyLine(
                    kind,
                    layers,
                    [float(t.mean()) for t in tasks],
                    [float(t.min()) for t in tasks],
                    [float(t.max()) for t in tasks],
                )
            )
    return lines


def energy_plot(comparison: Comparison) -> Figure | None:
    """Share of the task vectors' energy that the stored modules reproduce, per layer."""
    row = comparison.shown_in_detail()
    if row is None or not row.get("energy_kept"):
        return None
    picture, axes = plt.subplots(figsize=(6.4, 3.6))
    for line in energy_lines(row["energy_kept"]):
        shade = KIND_COLOURS[line.kind]
        x = range(len(line.layers))
        bounds = [[100 * v for v in values] for values in (line.low, line.high)]
        axes.fill_between(x, *bounds, color=shade, alpha=0.15, lw=0)
        mean = [100 * v for v in line.mean]
        axes.plot(x, mean, "o-", color=shade, ms=4, label=line.kind)
        axes.set_xticks(list(x), line.layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("energy kept (%)")
    axes.set_title(f"Energy of the task vectors that {row['method']} keeps")
    axes.legend(title="mean, and range over tasks", loc="best")
    axes.margins(x=0.06)
    return picture
