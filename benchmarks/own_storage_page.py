"""The page and the figure of :mod:`benchmarks.own_storage`, from docs/own_storage.json."""

from collections.abc import Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.frontier import storage_for
from benchmarks.suites import NOTES, in_words
from fusion_bench_didi.report.style import look, new_figure, save_figure

FILE = Path("docs") / "own_storage.json"
PAGE, FIGURE = Path("docs") / "own_storage.md", Path("docs") / "img" / "own_storage.png"
TITLES = {"real8": "real8: towers 128 wide", "text": "MiniLM: 384 wide, pre-trained"}
#: Points of retention that one run does not tell apart.
NOISE = 0.5
#: The default keeps everything from here on; rivals that store more are held against it at this.
MOST = 1.0
#: Part of a rival's storage that the default has at least where the two are held against each other.
LEAST = 0.9
#: What the figure shows of the difference; what is beyond lies at the edge.
SHOWN = (-2.0, 12.0)


def held(record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each suite by storage, each with the default beside it; those that failed, or whose storage it was not given yet, left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in TITLES:
        suite = record["suites"].get(name, {"rivals": {}})
        ours = sorted(suite.get("ours", {}).values(), key=lambda row: row["x"])
        rows = []
        for place, row in suite["rivals"].items():
            x = min(row.get("x", 0), MOST)
            most = [own for own in ours if LEAST * x <= own["x"] <= x + 1e-9]
            if most:
                gap = most[-1]["retention"] - row["retention"]
                rows.append(row | {"place": place, "ours": most[-1], "gap": gap})
        if rows:
            found[name] = sorted(rows, key=lambda row: row["x"])
    return found


def verdict(gap: float) -> str:
    if abs(gap) < NOISE:
        return "even"
    return "DiDi" if gap > 0 else "**rival**"


def counts(rows: list[dict[str, Any]]) -> str:
    """How often who is ahead, in words."""
    told = [verdict(row["gap"]) for row in rows]
    behind = [row["place"] for row in rows if row["gap"] < 0]
    text = f"{len(rows)} rows: DiDi ahead by {NOISE:g} points or more in {told.count('DiDi')}, even in {told.count('even')}, the rival "
    text += f"ahead by {NOISE:g} or more in {told.count('**rival**')}."
    if behind:
        text += f" Below the rival by any amount: {', '.join(behind)}."
    return text


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rival | chosen on validation | x excl. | retention | DiDi stores | DiDi keeps | difference | ahead |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        ours = row["ours"]
        lines.append(
            f"| {row['place']} | {_chosen(row)} | {row['x']:.4f} | {_kept(row)} | {ours['x']:.4f} | {ours['retention']:.1f} "
            f"| {row['gap']:+.1f} | {verdict(row['gap'])} |"
        )
    return "\n".join(lines)


def against_the_standard(rows: list[dict[str, Any]]) -> str:
    """Where the default keeps as much as NNCodec, in words; empty without it."""
    ours = sorted({(row["ours"]["x"], row["ours"]["retention"]) for row in rows})
    told = []
    for row in rows:
        least = storage_for(ours, row["retention"])
        if row["family"] == "NNCodec" and least is not None:
            told.append(
                f"{row['retention']:.1f} % at {row['x']:.3f}, DiDi at {least:.3f} ({least / row['x']:.2f} of it)"
            )
    if not told:
        return ""
    return f"At equal retention, linear in the logarithm of storage between DiDi's rows, NNCodec keeps {'; '.join(told)}."


def _kept(row: Mapping[str, Any]) -> str:
    """Retention, and of draws their mean and standard deviation."""
    spread = f" ± {stdev(row['draws']):.1f}" if "draws" in row else ""
    return f"{row['retention']:.1f}{spread}"


def _chosen(row: Mapping[str, Any]) -> str:
    """The settings that the validation split chose."""
    if row["candidates"] < 2:
        return "–" if row["candidates"] else "as compared"
    names = [n for n in ("gain", "alpha", "norm") if n in row["overrides"]]
    told = ", ".join(f"{name} {row['overrides'][name]}" for name in names) or "as published"  # fmt: skip
    return f"{told} (of {row['candidates']})"


def draw(suites: Mapping[str, list[dict[str, Any]]]) -> Figure:
    """One panel per suite: how far the default is ahead at each rival's storage."""
    families = list(dict.fromkeys(r["family"] for rows in suites.values() for r in rows))  # fmt: skip
    looks = dict(zip(families, zip(colormaps["tab20"].colors * 2, "osD^v" * 8)))
    low, high = SHOWN
    drawn: dict[str, Any] = {}
    with look():
        figure = new_figure(5.6 * len(suites), 5.2)
        panels = figure.subplots(1, len(suites), squeeze=False, sharey=True)[0]
        for axes, (name, rows) in zip(panels, suites.items()):
            for row in rows:
                of_family, mark = looks[row["family"]]
                gap = min(max(row["gap"], low), high)
                (drawn[row["family"]],) = axes.plot(row["x"], gap, mark, color=of_family, ms=6, ls="")  # fmt: skip
            axes.axhspan(-NOISE, NOISE, color="#999999", alpha=0.15, lw=0)
            axes.axhline(0, color="#777777", lw=0.8)
            axes.set(xscale="log", ylim=(low - 0.5, high + 0.5), title=TITLES[name])
            ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
            axes.set_xlabel(
                "stored beyond the backbone by the rival (fine-tuned models)"
            )
        panels[0].set_ylabel("DiDi at that storage minus the rival, points")
        across = 4 * len(suites)
        down = -(-len(drawn) // across)
        figure.tight_layout(rect=(0, 0.02 + 0.05 * down, 1, 1))
        figure.legend(drawn.values(), drawn, loc="lower center", ncols=across, fontsize=8)  # fmt: skip
    return figure


def page(record: Mapping[str, Any]) -> str:
    parts = []
    for name, rows in held(record).items():
        words = " ".join(filter(None, (counts(rows), against_the_standard(rows))))
        parts.append(f"## {TITLES[name]}\n\n{words}\n\n{table(rows)}")
        failed = [
            f"- {place}: {row['failed']}"
            for place, row in record["suites"][name]["rivals"].items()
            if "failed" in row
        ]
        if failed:
            parts.append("Not measured:\n\n" + "\n".join(failed))
    text = (NOTES / "own_storage.md").read_text()
    text = text.replace("{machine}", in_words(record["machine"]))
    return text.replace("{tables}", "\n\n".join(parts))


def write_page(record: Mapping[str, Any]) -> None:
    """docs/own_storage.md and its figure."""
    save_figure(draw(held(record)), FIGURE)
    PAGE.write_text(page(record))
