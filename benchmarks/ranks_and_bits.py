"""What each matrix is given: rank and bits per number, over budgets.

python -m benchmarks.ranks_and_bits                 # ../shared/suite/real8; docs/ranks_and_bits.md and a plot
"""

import argparse
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from benchmarks.suites import Suite, machine, write_json
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.pools.opening import open_pool
from fusion_bench_didi.report.style import (
    RANK_COLORS,
    headline,
    look,
    new_figure,
    save_figure,
)
from fusion_bench_didi.task_vectors.reader import matrix_shape

BUDGETS = (0.12, 0.16, 0.24, 0.36, 0.5, 0.75, 1.0, 1.24, 1.4, 2.0)
#: Columns of the table; what is in none of them is a floating type.
PRECISIONS = ("coded", "int2", "int3", "int4", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", help="a directory, or demo")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    suite = Suite(arguments.suite)
    infos = open_pool(suite.modelpool).infos
    found = {b: DiDiMerging(budget=b).run(suite.modelpool) for b in BUDGETS}
    # vectors have no ranks
    names = list(next(iter(found.values())).info["ranks"]["shared"])
    rows = []
    for name in names:
        full = min(matrix_shape(infos[name].shape))
        for budget, model in found.items():
            info, ranks = model.info, model.info["ranks"]
            entries = len(model.tasks) * infos[name].numel
            rows.append(
                {
                    "matrix": name,
                    "budget": budget,
                    "full": full,
                    "shared": ranks["shared"][name],
                    "experts": mean(e[name] for e in ranks["experts"].values()),
                    "precision": info["precision"][name],
                    "bits": model.storage.layer_bits.get(name, 0) / entries,
                    "common": name in info["subspaces"],
                }
            )
    write_json(
        arguments.out / "ranks_and_bits.json", {"machine": machine(), "rows": rows}
    )
    image = f"{Path(suite.label).name}_ranks_and_bits.png"
    (arguments.out / "img").mkdir(parents=True, exist_ok=True)
    save_figure(draw(rows, Path(suite.label).name), arguments.out / "img" / image)
    (arguments.out / "ranks_and_bits.md").write_text(_page(rows, image))


def draw(rows: list[dict], suite: str) -> Figure:
    """Rank and bits of every matrix over budgets, as two heat maps."""
    names = list(dict.fromkeys(row["matrix"] for row in rows))
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    at = {(row["matrix"], row["budget"]): row for row in rows}
    with look():
        figure = new_figure(11, 1 + 0.26 * len(names))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, label in (
            (panels[0], "experts", "Mean rank of an expert, % of full"),
            (panels[1], "bits", "Stored bits per entry of a task vector"),
        ):
            cells = [[_value(at[n, b], key) for b in budgets] for n in names]
            most = max(map(max, cells))
            shown = axes.imshow(cells, aspect="auto", cmap=RANK_COLORS, vmin=0)
            for y, line in enumerate(cells):
                for x, value in enumerate(line):
                    axes.text(
                        x,
                        y,
                        f"{value:.0f}" if key == "experts" else f"{value:.1f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if value > 0.55 * most else "black",
                    )
            axes.set_xticks(range(len(budgets)), budgets, fontsize=8)
            axes.set_xlabel("budget, in fine-tuned models beyond the backbone")
            axes.set_title(label)
            axes.grid(False)
            figure.colorbar(shown, ax=axes, fraction=0.04)
        panels[0].set_yticks(range(len(names)), map(_short, names), fontsize=7)
        headline(figure, f"{suite}: {_finding(rows)}")
        figure.tight_layout()
    return figure


def _finding(rows: list[dict], budget: float = 0.5) -> str:
    """Which matrices get most and least at one budget."""
    bits = {row["matrix"]: row["bits"] for row in rows if row["budget"] == budget}
    least, most = min(bits, key=bits.get), max(bits, key=bits.get)
    return f"at {budget:g} models an entry gets {bits[least]:.1f} bits ({_short(least)}) to {bits[most]:.1f} ({_short(most)})"


def _short(name: str) -> str:
    return name.removeprefix("vision_model.").removesuffix(".weight")


def _value(row: dict, key: str) -> float:
    return 100 * row["experts"] / row["full"] if key == "experts" else row["bits"]


def _page(rows: list[dict], image: str) -> str:
    lines = [
        "# Ranks and bits per matrix",
        "",
        "`python -m benchmarks.ranks_and_bits`; the default (`factor_dtype=auto`, `shared=auto`). A rank of 100 % is stored",
        "whole; in common subspaces an expert's rank is the size of its core.",
        "",
        f"![ranks and bits](img/{image})",
        "",
        "| budget | mean rank, % of full | matrices stored whole | entropy-coded / in 2 / 3 / 4 / 8 / more bits | in common subspaces |",
        "|--:|--:|--:|--:|--:|",
    ]
    for budget in BUDGETS:
        mine = [row for row in rows if row["budget"] == budget]
        rank = mean(100 * row["experts"] / row["full"] for row in mine)
        whole = sum(row["experts"] == row["full"] for row in mine)
        counts = [sum(row["precision"] == p for row in mine) for p in PRECISIONS]
        bits = " / ".join(map(str, [*counts, len(mine) - sum(counts)]))
        common = sum(row["common"] for row in mine)
        lines.append(
            f"| {budget} | {rank:.0f} | {whole} of {len(mine)} | {bits} | {common} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
