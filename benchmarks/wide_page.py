"""The page and the figure of :mod:`benchmarks.wide_towers`, from docs/wide_towers.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.frontier import retention_at, storage_for
from benchmarks.suites import NOTES, in_words, mean
from fusion_bench_didi.report.style import color, look, new_figure, save_figure

FILE = Path("docs") / "wide_towers.json"
PAGE, FIGURE = Path("docs") / "wide_towers.md", Path("docs") / "img" / "wide_towers.png"
KEPT = 99.0
#: Storage up to which the figure goes.
MOST = 1.0
#: Retention from which on it shows it; what nowhere keeps so much is in the tables alone.
LEAST = 80
Curves = dict[str, list[dict[str, Any]]]


def chosen(rows: Mapping[str, dict[str, Any]]) -> Curves:
    """Rows by family, by storage; of candidates for one place of a curve the one best on validation images."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows.values():
        if "retention" not in row:
            continue
        place = row["family"], row["dial"]
        kept = row["validation_retention"]
        if place not in best or kept > best[place]["validation_retention"]:
            best[place] = row
    curves: Curves = {}
    for (family, _), row in best.items():
        curves.setdefault(family, []).append(row)
    return {f: sorted(found, key=lambda row: row["x"]) for f, found in curves.items()}


def points(curve: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(row["x"], row["retention"]) for row in curve]


def stored_for(curve: Sequence[Mapping[str, Any]], kept: float) -> str:
    """Where a curve keeps so much, in words."""
    found = points(curve)
    x = storage_for(found, kept)
    if x is None and len(found) == 1 and found[0][1] >= kept:
        x = found[0][0]
    if x is not None:
        least = x <= found[0][0]
        return f"at most {x:.3f}" if least else f"{x:.3f}"
    stored, best = max(found, key=lambda p: p[1])
    return f"not: {best:.1f} at {stored:.3f}"


def marks(widths: Mapping[str, Curves]) -> str:
    """Storage at which 99 % is kept, method by width."""
    families = list(dict.fromkeys(f for curves in widths.values() for f in curves))
    lines = [
        "| method | " + " | ".join(f"{w} wide" for w in widths) + " |",
        "|---|" + "---|" * len(widths),
    ]
    for family in families:
        cells = [
            stored_for(curves[family], KEPT) if family in curves else "–"
            for curves in widths.values()
        ]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(curves: Curves) -> str:
    """Every row of a width, and what the default keeps at its storage."""
    ours = points(curves.get("DiDi", []))
    lines = [
        "| method | x excl. | retention | validation | DiDi at that storage |",
        "|---|--:|--:|--:|--:|",
    ]
    for family, curve in curves.items():
        for row in curve:
            beside = None if family == "DiDi" else retention_at(ours, row["x"])
            lines.append(
                f"| {family} {row['dial']}".rstrip()
                + f"{_searched(row)} | {row['x']:.4f} | {row['retention']:.1f} | {row['validation_retention']:.1f} "
                f"| {'–' if beside is None else f'{beside:.1f}'} |"
            )
    return "\n".join(lines)


def _searched(row: Mapping[str, Any]) -> str:
    """The setting that validation images chose."""
    names = [n for n in ("gain", "alpha", "norm") if n in row["overrides"]]
    return "".join(f", {name} {row['overrides'][name]}" for name in names)


def towers(record: Mapping[str, Any]) -> str:
    """Accuracy of base and fine-tuned towers per width."""
    lines = [
        "| width | base | fine-tuned | base keeps | lowest fine-tuned | trained in s |",
        "|--:|--:|--:|--:|---|--:|",
    ]
    for width, found in _widths(record).items():
        base, tuned = found["base"], found["individuals"]
        kept = 100 * sum(base[t] / tuned[t] for t in tuned) / len(tuned)
        lowest = min(tuned, key=tuned.get)
        seconds = found.get("seconds")
        lines.append(
            f"| {width} | {100 * mean(base):.1f} | {100 * mean(tuned):.1f} | {kept:.1f} "
            f"| {lowest} {100 * tuned[lowest]:.1f} | {'–' if seconds is None else f'{seconds:.0f}'} |"
        )
    return "\n".join(lines)


def _widths(record: Mapping[str, Any]) -> dict[str, Any]:
    held = record["widths"]
    return {w: held[w] for w in sorted(held, key=int) if held[w]["rows"]}


def draw(widths: Mapping[str, Curves]) -> Figure:
    """One panel per width: logarithm of storage, the last percents."""
    families = [f for f in dict.fromkeys(f for c in widths.values() for f in c) if f != "DiDi"]  # fmt: skip
    colors = dict(zip(families, colormaps["tab20"].colors * 2))
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    drawn: dict[str, Any] = {}
    with look():
        figure = new_figure(4.6 * len(widths), 4.8)
        panels = figure.subplots(1, len(widths), squeeze=False, sharey=True)[0]
        for axes, (width, curves) in zip(panels, widths.items()):
            for family, curve in curves.items():
                shown = [p for p in points(curve) if p[0] <= MOST]
                if max((kept for _, kept in shown), default=0) < LEAST:
                    continue
                style = {"color": colors.get(family), "marker": "s", "ms": 4, "lw": 1}
                if family == "DiDi":
                    style = {"color": color("ours"), "marker": "o", "ms": 5, "lw": 2.2, "zorder": 5}  # fmt: skip
                (drawn[family],) = axes.plot(*zip(*shown), **style)
            axes.set(xscale="log", xlim=(0.009, MOST * 1.1), ylim=(LEAST, 102), title=_finding(width, curves))  # fmt: skip
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
            axes.set_xlabel("stored beyond the backbone (fine-tuned models)")
            axes.axhline(KEPT, color="#777777", lw=0.8, ls=(0, (4, 3)))
        panels[0].set_ylabel("retention, % of the individuals")
        across = max(2, 3 * len(widths) - 1)
        down = -(-len(drawn) // across)
        figure.tight_layout(rect=(0, 0.02 + 0.05 * down, 1, 1))
        figure.legend(drawn.values(), drawn, loc="lower center", ncols=across, fontsize=8)  # fmt: skip
    return figure


def _finding(width: str, curves: Curves) -> str:
    return f"real8, {width} wide: DiDi keeps {KEPT:g} % in {stored_for(curves['DiDi'], KEPT)}"


def write_page() -> None:
    """docs/wide_towers.md and its figure."""
    record = json.loads(FILE.read_text())
    widths = {w: chosen(found["rows"]) for w, found in _widths(record).items()}
    save_figure(draw(widths), FIGURE)
    failed = [
        f"- {w}: {row['key']}: {row['failed']}"
        for w, found in _widths(record).items()
        for row in found["rows"].values()
        if "failed" in row
    ]
    parts = [f"### {w} wide\n\n{table(curves)}" for w, curves in widths.items()]
    parts += ["### Not measured\n\n" + "\n".join(failed)] if failed else []
    where = "\n".join(
        f"- {w} wide: {in_words({k: v for k, v in found['machine'].items() if v})}."
        for w, found in _widths(record).items()
    )
    text = (NOTES / "wide_towers.md").read_text()
    for key, value in {
        "command": f"`python -m benchmarks.wide_towers` on\n\n{where}",
        "towers": towers(record),
        "marks": marks(widths),
        "tables": "\n\n".join(parts),
    }.items():
        text = text.replace("{" + key + "}", value)
    PAGE.write_text(text)
