"""The printed plots of what a model spent its storage on: a heat map of ranks, and energy kept by layer."""

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from . import findings
from .comparison import Comparison
from .modules import KIND_COLORS, RankTable, energy_lines
from .style import RANK_COLORS, new_figure, title


def rank_plot(comparison: Comparison) -> Figure | None:
    """Ranks as a heat map: layer x module, a block for the shared part and one per expert."""
    row = comparison.shown_in_detail()
    if row is None:
        return None
    table = RankTable.of(row["ranks"])
    blocks, lines, modules = table.values.shape
    gap = 0.6
    picture = new_figure(max(6.0, 1.8 + 0.2 * blocks * modules), 1.3 + 0.3 * lines)
    axes = picture.subplots()
    most = max(np.nanmax(table.values), 1)
    colors = colormaps[RANK_COLORS]
    for b, block in enumerate(table.blocks):
        left = b * (modules + gap)
        for y in range(lines):
            cells = table.values[b, y]
            whole = y < lines - _layers(table)
            width = modules if whole else 1
            for x in range(1 if whole else modules):
                _cell(axes, left + x, y, width, cells[x], most, colors)
        _name_columns(axes, table, left)
        weight = "bold" if b == 0 else "normal"
        middle = left + modules / 2
        axes.text(middle, -0.62, block, ha="center", va="bottom", fontsize=8, fontweight=weight)  # fmt: skip
    axes.set_xlim(-0.1, blocks * (modules + gap) - gap + 0.1)
    axes.set_ylim(lines + 0.9, -1.3)
    axes.set_yticks([y + 0.5 for y in range(lines)], table.lines, fontsize=7)
    axes.set_xticks([])
    axes.grid(False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    scale = ScalarMappable(Normalize(0, most), colors)
    picture.colorbar(scale, ax=axes, label="rank", fraction=0.02, pad=0.01)
    title(axes, findings.of_ranks(comparison), pad=24)
    handles = [
        Rectangle((0, 0), 1, 1, color=KIND_COLORS[k], label=k)
        for k in dict.fromkeys(p.kind for p in table.modules)
    ]
    axes.legend(
        handles=handles,
        loc="lower right",
        ncols=3,
        fontsize=7,
        bbox_to_anchor=(1, 1),
        borderaxespad=0.3,
    )
    return picture


def _name_columns(axes, table: RankTable, left: float) -> None:
    """The modules of a block: a bar of their kind's color above, their names below."""
    for x, place in enumerate(table.modules):
        shade = KIND_COLORS[place.kind]
        axes.add_patch(Rectangle((left + x, -0.42), 1, 0.26, color=shade, lw=0))
        axes.text(
            left + x + 0.5,
            len(table.lines) + 0.12,
            place.short,
            rotation=90,
            ha="center",
            va="top",
            fontsize=6,
            color=shade,
        )


def _layers(table: RankTable) -> int:
    return sum(line.startswith("layer ") for line in table.lines)


def _cell(axes, x, y, width, value, most, colors) -> None:
    if np.isnan(value):
        return
    axes.add_patch(
        Rectangle(
            (x, y), width, 1, facecolor=colors(value / most), edgecolor="white", lw=0.8
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


def energy_plot(comparison: Comparison) -> Figure | None:
    """Share of the task vectors' energy that the stored modules reproduce, per layer."""
    row = comparison.shown_in_detail()
    if row is None or not row.get("energy_kept"):
        return None
    picture = new_figure(6.4, 3.6)
    axes = picture.subplots()
    for line in energy_lines(row["energy_kept"]):
        shade = KIND_COLORS[line.kind]
        x = range(len(line.layers))
        bounds = [[100 * v for v in values] for values in (line.low, line.high)]
        axes.fill_between(x, *bounds, color=shade, alpha=0.15, lw=0)
        mean = [100 * v for v in line.mean]
        axes.plot(x, mean, "o-", color=shade, ms=4, label=line.kind)
        axes.set_xticks(list(x), line.layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("energy kept (%)")
    title(axes, findings.of_energy(comparison))
    axes.legend(title="mean, and range over tasks", loc="best")
    axes.margins(x=0.06)
    return picture
