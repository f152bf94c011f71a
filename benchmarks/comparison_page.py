"""The pages of the two comparisons, and the table of the README, from one run of the comparison program each.

    python -m benchmarks.comparison_page real8            # run it (continued if it was killed), then write the pages
    python -m benchmarks.comparison_page demo --at DIR    # where the comparison is, or is to be
    python -m benchmarks.comparison_page real8 --add randes   # one more row, the others stay as they are
    python -m benchmarks.comparison_page --pages          # the pages anew from docs/comparison_*.json, nothing is run

Text comes from ``benchmarks/notes``: every figure in it is a field such as ``{average[TSV-C]}``, filled from the rows.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from benchmarks import language_page
from benchmarks.suites import DEFAULT, NOTES, in_words, machine, write_json
from fusion_bench_didi.report import plots
from fusion_bench_didi.report.comparison import Comparison
from fusion_bench_didi.report.style import look, save_figure
from fusion_bench_didi.report.tables import as_markdown

DOCS = Path("docs")
README = Path("README.md")
#: Blocks of the README and the notes that they are made of.
BLOCKS = {"summary": "readme_summary.md", "results": "readme.md"}

#: Pictures that a page shows, of those that the report draws.
PICTURES = {
    "real8": (
        "accuracy_vs_storage",
        "accuracy_by_task",
        "ranks",
        "energy_kept",
    ),
    "demo": ("accuracy_vs_storage",),
    "text": ("accuracy_vs_storage", "accuracy_by_task"),
    "language": ("accuracy_vs_storage",),
}

#: Budgets of few bits, of which language models are judged.
FEW_BITS = {"001": 0.01, "003": 0.03, "010": 0.1}
#: Rows of the language suite: those whose methods run on language models, in some minutes and less than 8 GB.
LANGUAGE_ROWS = (
    *("pretrained", "individuals", "averaging", "task_arithmetic", "tsv_m"),
    *("emr", "randes", "tall_ties", "twin", "tsv_c", "bitdelta", "dare_090"),
    "t_switch_090",
    *(
        "compeft_10",
        "ultra_delta_090",
        "delta_come",
        "didi_001",
        "didi_003",
        "didi_010",
    ),
    *("didi_024", "didi_050", "didi_100", "didi_140", "didi_m_projection"),
)
#: Rows of a suite's own models.
REFERENCES = ("pretrained", "individuals")
#: What a suite cannot run, or runs otherwise than didi_compare has it.
CHANGES = {
    "text": (
        "~entries.wemoe",  # the host has it for CLIP, Flan-T5 and Mistral
        "skip=[wudi]",  # 25 minutes: 300 steps on products of all rows of a matrix with all others, of every task
        "++entries.wudi.overrides.exclude_keys=[embeddings.word_embeddings.weight]",
        "++entries.free.overrides.patterns=[*attention*,*intermediate*,*output.dense*]",
        *(
            f"++entries.{key}.overrides{inner}.objective=proxy"
            for key, inner in (
                ("merge_oracle", ""),
                ("merge_performance", ".base_method"),
                ("merge_balanced", ".base_method"),
                ("merge_storage", ".base_method"),
            )
        ),
    ),
    "language": (
        f"only=[{','.join(LANGUAGE_ROWS)}]",
        *(
            f"+entries.didi_{key}={{name:'DiDi {budget}',method:didi,overrides:{{budget:{budget}}},"
            "group:dynamic,family:DiDi,routing:oracle}"
            for key, budget in FEW_BITS.items()
        ),
    ),
}
#: Fields of a row that pages need; ranks and energies per matrix are of the pictures.
LEFT_OUT = ("ranks", "energy_kept", "energy_tasks")


def command(suite: str, place: Path) -> list[str]:
    """The comparison's command line."""
    pools, start = f"didi/{suite}", []
    if suite in ("real8", "text", "language"):
        pools, start = suite, ["--config-dir", "benchmarks/conf"]
    return [
        *("fusion_bench", *start, "--config-name", "didi_compare"),
        *(f"modelpool={pools}", f"taskpool={pools}"),
        f"path.log_dir={place}",
        *([] if suite == "language" else ["save_artifacts=true"]),
        *CHANGES.get(suite, ()),
    ]


def run(suite: str, place: Path, *changes: str) -> None:
    """Make or continue the comparison on one thread, and take from it what the pages show.

    Args:
        changes: more of the command line.
    """
    found = compared([*command(suite, place), *changes], place)
    write_json(DOCS / f"comparison_{suite}.json", shown(found.data))
    for picture in PICTURES[suite]:
        shutil.copy(place / f"{picture}.png", DOCS / "img" / f"{suite}_{picture}.png")


def add(suite: str, place: Path, keys: Sequence[str], *changes: str) -> None:
    """Measure some rows of a comparison, and put them among those of its page, which stay as they are.

    Raises:
        ValueError: if the suite's own models are not those of the page, and if a row failed: what the page has is better.
    """
    only = dict.fromkeys([*REFERENCES, *keys])
    line = [c for c in command(suite, place) if not c.startswith(("only=", "skip="))]
    found = compared([*line, f"only=[{','.join(only)}]", *changes], place)
    file = DOCS / f"comparison_{suite}.json"
    data = json.loads(file.read_text())
    rows = {row["key"]: row for row in data["rows"]}
    made = {row["key"]: row for row in shown(found.data)["rows"]}
    if failed := [key for key in only if not made.get(key) or made[key]["error"]]:
        raise ValueError(f"{', '.join(failed)} failed, so the page stays as it is: see {place / 'host.log'}.")  # fmt: skip
    for key in REFERENCES:
        if made[key]["accuracy"] != rows[key]["accuracy"]:
            raise ValueError(f"{made[key]['method']} has other accuracies than on the page: run the whole comparison.")  # fmt: skip
    rows |= {key: made[key] for key in keys}
    order = [*OmegaConf.load(Path("config") / "didi_compare.yaml").entries, *rows]
    data["rows"] = sorted(rows.values(), key=lambda row: order.index(row["key"]))
    write_json(file, data)


def compared(line: Sequence[str], place: Path) -> Comparison:
    """What a comparison's command line, on one thread, leaves in its directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIDI_SUITE": str(DEFAULT)}
    program = str(Path(sys.executable).with_name(line[0]))
    subprocess.run([program, *line[1:]], check=True, env=environment)
    return Comparison.read(place / "comparison.json")


def shown(data: Mapping[str, Any]) -> dict[str, Any]:
    """What pages need of a comparison, JSON-plain; paths are as seen from the repository, on every machine."""
    rows = [
        {key: value for key, value in row.items() if key not in LEFT_OUT}
        for row in data["rows"]
    ]
    here, text = Path.cwd(), json.dumps({**data, "rows": rows, "machine": machine()})
    return json.loads(text.replace(f"{here}/", "").replace(str(here.parent), ".."))


def figures(comparison: Comparison) -> dict[str, Any]:
    """What the notes may name: per column, a mapping of methods to printed figures."""

    def column(value) -> dict[str, str]:
        return {row["method"]: value(row) for row in comparison.good}

    best = max(
        (row for row in comparison.good if row["group"] == "static"),
        key=lambda row: row["average"],
    )
    return {
        "average": column(lambda row: f"{100 * row['average']:.1f}"),
        "retention": column(
            lambda row: f"{100 * row['retention']['mean_of_ratios']:.1f}"
        ),
        "x": column(lambda row: f"{row['x_excl']:.2f}"),
        "seconds": column(lambda row: f"{row['seconds'] or 0:.1f}"),
        "task": {
            row["method"]: {t: f"{100 * a:.1f}" for t, a in row["accuracy"].items()}
            for row in comparison.good
        },
        "best_static": best["method"],
        "average_of_best": f"{100 * best['average']:.1f}",
        "retention_of_best": f"{100 * best['retention']['mean_of_ratios']:.1f}",
        "failed": len(comparison.failed),
    }


def page(suite: str) -> str:
    """The page of one comparison."""
    comparison = Comparison.read(DOCS / f"comparison_{suite}.json")
    line = shlex.join(command(suite, Path("outputs") / suite))
    more = language_page.fields(comparison) if suite == "language" else {}
    fields = figures(comparison) | more | {
        "command": line,
        "table": as_markdown(comparison).rstrip(),
        "machine": in_words(comparison.data["machine"]),
        "left_out": "; ".join(not_run(comparison)),
    }  # fmt: skip
    note = (NOTES / f"comparison_{suite}.md").read_text()
    return without_points_of(not_run(comparison), note, fields).format(**fields)


def not_run(comparison: Comparison) -> list[str]:
    """Names of the rows of ``didi_compare`` that a comparison lacks."""
    entries = OmegaConf.load(Path("config") / "didi_compare.yaml").entries
    there = {row["key"] for row in comparison.data["rows"]}
    return [entry.name for key, entry in entries.items() if key not in there]


def without_points_of(names: Collection[str], note: str, fields: Mapping[str, Any]) -> str:  # fmt: skip
    """A note less the points of its lists that cite rows which were not run; other fields that are missing are errors."""

    def kept(found: re.Match[str]) -> str:
        try:
            found[0].format(**fields)
        except KeyError as missing:
            if missing.args[0] not in names:
                raise
            return ""
        return found[0]

    return re.sub(r"(?m)^- .*\n(?:  .*\n)*", kept, note)


def pictures(suite: str) -> dict[str, Figure]:
    """Those of the page that need no more than its stored figures."""
    comparison = Comparison.read(DOCS / f"comparison_{suite}.json")
    with look():
        drawn = plots.draw(comparison)
    return {name: drawn[name] for name in PICTURES[suite] if name in drawn}


def readme(text: str) -> str:
    """The README with its results as they are in ``docs/comparison_real8.json``."""
    comparison = Comparison.read(DOCS / "comparison_real8.json")
    fields = figures(comparison) | {"table": "\n".join(_short_table(comparison))}
    for name, note in BLOCKS.items():
        block = (NOTES / note).read_text().format(**fields)
        pattern = rf"(<!-- {name}[^>]*-->\n).*(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda found: found[1] + block + found[2], text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"{README} has {count} blocks {name}, expected one.")
    return text


#: Rows of the README's table; static methods are one row, the best.
SHOWN = (
    "Individuals",
    "DiDi-M 1.4",
    "DiDi-S 1.24",
    "DiDi 0.5",
    "DiDi 0.24",
    "DiDi 0.12",
    "DARE 80 %",
    "DARE 90 %",
    "T-Switch 60 %",
    "Delta-CoMe",
    "TSV-C",
    "DiDi-fp32 1.24",
    "DiDi-paper 1.4",
    "Twin-Merging",
    "TALL + TIES",
    "EMR",
    "DiDi-fp32 0.5",
)


def _short_table(comparison: Comparison) -> list[str]:
    rows: Mapping[str, Any] = {row["method"]: row for row in comparison.good}
    best = figures(comparison)["best_static"]
    chosen = sorted((*SHOWN, best), key=lambda name: -rows[name]["average"])
    lines = [
        "| method | stored beyond the backbone | average | retention |",
        "|---|--:|--:|--:|",
    ]
    for name in chosen:
        row, label = rows[name], name
        if name == best:
            label = f"best static merge ({name})"
        kept = row["retention"]["mean_of_ratios"]
        lines.append(
            f"| {label} | {row['x_excl']:.2f} | {100 * row['average']:.1f} | {100 * kept:.1f} |"
        )
    return lines


def write_pages() -> None:
    for file in sorted(DOCS.glob("comparison_*.json")):
        suite = file.stem.removeprefix("comparison_")
        file.with_suffix(".md").write_text(page(suite))
        for name, picture in pictures(suite).items():
            save_figure(picture, DOCS / "img" / f"{suite}_{name}.png")
    README.write_text(readme(README.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="?", choices=PICTURES)
    parser.add_argument("--at", type=Path, help="directory of the comparison")
    parser.add_argument("--add", nargs="+", metavar="KEY", help="measure these rows alone, beside those of the page")  # fmt: skip
    parser.add_argument("--pages", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if not arguments.pages:
        if not arguments.suite:
            parser.error("name a suite, or give --pages")
        suite = arguments.suite
        if arguments.add:
            place = arguments.at or Path("outputs") / f"{suite}_added"
            add(suite, place.absolute(), arguments.add)
        else:
            run(suite, (arguments.at or Path("outputs") / suite).absolute())
    write_pages()


if __name__ == "__main__":
    main()
