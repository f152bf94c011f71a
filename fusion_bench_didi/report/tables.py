"""``comparison.csv``, ``comparison.md`` and ``comparison.tex``."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .comparison import GROUPS, Comparison, best_two

Row = Mapping[str, Any]


def write(comparison: Comparison, directory: Path) -> list[Path]:
    """All three tables."""
    makers = {"csv": as_csv, "md": as_markdown, "tex": as_latex}
    files = []
    for suffix, make in makers.items():
        files.append(directory / f"comparison.{suffix}")
        files[-1].write_text(make(comparison))
    return files


def as_csv(comparison: Comparison) -> str:
    """One line per row, every figure unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    plain = ("method", "group", "error", "average")
    measured = (
        "x_excl x_incl bytes_excl bytes_incl bytes_written published_x seconds peak_gb added_gb uses_data routing notes"
    ).split()
    conventions = list(comparison.data["retention"])
    writer.writerow(
        [*plain, *(f"retention_{c}" for c in conventions)]
        + [f"accuracy_{task}" for task in comparison.tasks]
        + measured
    )
    for row in comparison.rows:
        writer.writerow(
            [row[k] for k in plain]
            + [row["retention"][c] for c in conventions]
            + [row["accuracy"][task] for task in comparison.tasks]
            + [row.get(k) for k in measured]
        )
    return out.getvalue()


LEGEND = (
    "Accuracy in %. Retention: mean over tasks of accuracy / accuracy of the task's own model (in brackets: ratio of "
    "the averages). Storage in units of one fine-tuned model: beyond the backbone, and with it. Routing: oracle = the "
    "task is given; otherwise every image finds its experts by itself, by the router named or the method's own. Peak: most "
    "memory of the process while merging, libraries included."
)


def columns(comparison: Comparison) -> list[tuple[str, Callable[[Row], str]]]:
    """Heading and cell of everything beside the accuracies."""
    return [
        ("Retention", retention),
        ("x excl.", lambda r: number(r["x_excl"], 2)),
        ("x incl.", lambda r: number(r["x_incl"], 2)),
        ("x printed", lambda r: number(r["published_x"], 2)),
        ("Merge s", lambda r: number(r["seconds"], 1)),
        ("Peak GB", lambda r: number(r["peak_gb"], 2)),
        ("Data", lambda r: "–" if r["uses_data"] == "none" else r["uses_data"]),
        ("Routing", lambda r: "–" if r["routing"] == "none" else r["routing"]),
    ]


def as_markdown(comparison: Comparison) -> str:
    """Best in bold, second best in italics, within static and within dynamic methods."""
    extra = columns(comparison)
    heads = ["Method", *comparison.tasks, "Average", *(head for head, _ in extra)]
    heads.append("Notes")
    lines = [_pipe(heads), _pipe(["---"] + ["--:"] * (len(heads) - 2) + ["---"])]
    for group, title in GROUPS.items():
        rows = comparison.group(group)
        if not rows:
            continue
        lines.append(_pipe([f"**{title}**"] + [""] * (len(heads) - 1)))
        cells = marked(comparison, rows, lambda s: f"**{s}**", lambda s: f"_{s}_")
        for row in rows:
            if row["error"]:
                message = f"failed: {row['error']}".replace("\n", " ")
                lines.append(
                    _pipe([row["method"]] + ["–"] * (len(heads) - 2) + [message])
                )
                continue
            values = [cell(row) for _, cell in extra]
            lines.append(_pipe([row["method"], *cells(row), *values, row["notes"]]))
    legend = f"{LEGEND} Best and second best of a group: **bold**, _italics_."
    return "\n".join([*lines, "", legend, ""])


def as_latex(comparison: Comparison) -> str:
    """A ``tabular`` for ``booktabs``; best in bold, second best underlined."""
    extra = [c for c in columns(comparison) if c[0] not in ("Peak GB", "x printed")]
    heads = ["Method", *comparison.tasks, "Average", *(head for head, _ in extra)]
    figures = "r" * (len(comparison.tasks) + len(extra) - 1)
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{figures}ll}}",
        "\\toprule",
        _tex(heads),
    ]
    for group, title in GROUPS.items():
        rows = comparison.group(group)
        if not rows:
            continue
        lines += [
            "\\midrule",
            f"\\multicolumn{{{len(heads)}}}{{l}}{{\\emph{{{title}}}}} \\\\",
        ]
        cells = marked(
            comparison,
            rows,
            lambda s: f"\\textbf{{{s}}}",
            lambda s: f"\\underline{{{s}}}",
        )
        for row in rows:
            if row["error"]:
                lines.append(
                    f"{escaped(row['method'])} & \\multicolumn{{{len(heads) - 1}}}{{l}}{{failed}} \\\\"
                )
                continue
            plain = [escaped(cell(row)) for _, cell in extra]
            lines.append(
                " & ".join([escaped(row["method"]), *cells(row), *plain]) + r" \\"
            )
    noted = [r for r in comparison.rows if r.get("notes")]
    notes = "; ".join(
        f"\\emph{{{escaped(r['method'])}}}: {escaped(r['notes'])}" for r in noted
    )
    below = [f"\\par\\smallskip{{\\footnotesize {notes}.\\par}}"] if noted else []
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", *below, ""])


def marked(
    comparison: Comparison,
    rows: Sequence[Row],
    first: Callable[[str], str],
    second: Callable[[str], str],
) -> Callable[[Row], list[str]]:
    """Cells of the accuracies and their average, with the best two of the group marked; references are not."""
    getters = [lambda r, t=task: r["accuracy"][t] for task in comparison.tasks]
    getters.append(lambda r: r["average"])
    compete = [] if rows[0]["group"] == "reference" else rows
    places = [best_two(compete, get) for get in getters]

    def cells(row: Row) -> list[str]:
        texts = []
        for get, (best, next_best) in zip(getters, places):
            value = get(row)
            text = number(value and 100 * value, 1)
            if row["method"] in best:
                text = first(text)
            elif row["method"] in next_best:
                text = second(text)
            texts.append(text)
        return texts

    return cells


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def retention(row: Row) -> str:
    """Both conventions in per cent."""
    both = [
        number(v and 100 * v, 1)
        for v in (
            row["retention"]["mean_of_ratios"],
            row["retention"]["ratio_of_averages"],
        )
    ]
    return "–" if both == ["–", "–"] else f"{both[0]} ({both[1]})"


def escaped(text: str) -> str:
    """For LaTeX."""
    for character in "&%$#_":
        text = text.replace(character, "\\" + character)
    return text.replace("–", "--")


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _tex(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"
