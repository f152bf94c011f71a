"""``comparison.csv``, ``comparison.md`` and ``comparison.tex``."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import write_whole
from .comparison import GROUPS, Comparison, marker

Row = Mapping[str, Any]


def write(comparison: Comparison, directory: Path) -> list[Path]:
    """Write all three tables."""
    makers = {"csv": as_csv, "md": as_markdown, "tex": as_latex}
    files = []
    for suffix, make in makers.items():
        files.append(directory / f"comparison.{suffix}")
        write_whole(files[-1], make(comparison))
    return files


def as_csv(comparison: Comparison) -> str:
    """One line per row, every figure unrounded."""
    plain = ("method", "group", "error", "average")
    measured = (
        "x_excl x_incl bytes_excl bytes_incl bytes_written published_x seconds peak_gb added_gb uses_data routing notes"
    ).split()
    lines = [
        {key: row[key] for key in plain}
        | {f"retention_{convention}": v for convention, v in row["retention"].items()}
        | {f"{comparison.metric(t)}_{t}": row["accuracy"][t] for t in comparison.tasks}
        | {key: row.get(key) for key in measured}
        | {
            f"{key}_{end}": bound
            for key in (RANGES if comparison.over_seeds else ())
            for end, bound in zip(("least", "largest"), row.get(key) or (None, None))
        }
        for row in comparison.rows
    ]
    frame = pd.DataFrame(lines, dtype=object)  # else whole numbers beside gaps get ".0"
    return frame.to_csv(index=False, lineterminator="\n")


LEGEND = (
    "Accuracy in %. Retention: mean over tasks of accuracy / accuracy of the task's own model (in brackets: ratio of "
    "the averages). Storage in units of one fine-tuned model: beyond the backbone, and with it. Routing: oracle = the "
    "task is given; otherwise every image finds its experts by itself, by the router named or the method's own. Peak: most "
    "memory of the process while merging, libraries included."
)

Column = tuple[str, Callable[[Row], str]]
#: What a method looks at, and what finds the task.
WORDS: tuple[Column, ...] = (
    ("Data", lambda r: "–" if r["uses_data"] == "none" else r["uses_data"]),
    ("Routing", lambda r: "–" if r["routing"] == "none" else r["routing"]),
)
#: Keys of rows that are of several seeds: least and largest average, and least and largest mean of ratios.
RANGES = ("over_seeds", "retention_over_seeds")


def columns(comparison: Comparison) -> list[Column]:
    """Heading and cell of everything beside the accuracies."""
    seeds: list[Column] = [
        ("Average over seeds", lambda r: between(r.get("over_seeds"))),
        ("Retention over seeds", lambda r: between(r.get("retention_over_seeds"))),
    ]
    return [
        ("Retention", retention),
        *(seeds if comparison.over_seeds else ()),
        ("x excl.", lambda r: number(r["x_excl"], 2)),
        ("x incl.", lambda r: number(r["x_incl"], 2)),
        ("x printed", lambda r: number(r["published_x"], 2)),
        ("Merge s", lambda r: number(r["seconds"], 1)),
        ("Peak GB", lambda r: number(r["peak_gb"], 2)),
        *WORDS,
    ]


def as_markdown(comparison: Comparison) -> str:
    """Best in bold, second best in italics, within static and within dynamic methods."""
    extra = columns(comparison)
    heads = ["Method", *comparison.tasks, "Average", *(h for h, _ in extra), "Notes"]
    width = len(heads)
    lines = [_pipe(heads), _pipe(["---", *["--:"] * (width - 2), "---"])]
    for title, rows in _groups(comparison, extra, ("**{}**", "_{}_")):
        lines.append(_pipe([f"**{title}**", *[""] * (width - 1)]))
        for row, cells in rows:
            note = row["notes"]
            if row["error"]:
                cells = ["–"] * (width - 2)
                note = f"failed: {row['error']}"
            lines.append(_pipe([row["method"], *cells, note]))
    legend = f"{comparison.worded(LEGEND)} Best and second best of a group: **bold**, _italics_."
    return "\n".join([*lines, "", legend, ""])


def as_latex(comparison: Comparison) -> str:
    """A ``tabular`` for ``booktabs``; best in bold, second best underlined."""
    extra = [c for c in columns(comparison) if c[0] not in ("Peak GB", "x printed")]
    heads = ["Method", *comparison.tasks, "Average", *(head for head, _ in extra)]
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * (len(heads) - 3)}ll}}",
        "\\toprule",
        _tex(map(escaped, heads)),
    ]
    best = ("\\textbf{{{}}}", "\\underline{{{}}}")
    for title, rows in _groups(comparison, extra, best, written=escaped):
        span = f"\\multicolumn{{{len(heads)}}}{{l}}{{\\emph{{{title}}}}}"
        lines += ["\\midrule", _tex([span])]
        for row, cells in rows:
            if row["error"]:
                cells = [f"\\multicolumn{{{len(heads) - 1}}}{{l}}{{failed}}"]
            lines.append(_tex([escaped(row["method"]), *cells]))
    notes = "; ".join(
        f"\\emph{{{escaped(row['method'])}}}: {escaped(row['notes'])}"
        for row in comparison.rows
        if row.get("notes")
    )
    below = [f"\\par\\smallskip{{\\footnotesize {notes}.\\par}}"] if notes else []
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", *below, ""])


def _groups(
    comparison: Comparison,
    extra: Sequence[Column],
    marks: Sequence[str],
    *,
    written: Callable[[str], str] = str,
) -> Iterator[tuple[str, list[tuple[Row, list[str]]]]]:
    """Title of each group that has rows, and its rows with their cells.

    Args:
        extra: columns after the accuracies.
        marks: formats for the best two of a group.
        written: the text of a cell without its mark, as the table has it.
    """

    def text(value: float | None) -> str:
        return written(number(value, 1, 100))

    figures = [f for _, f in comparison.accuracies()]
    cells = [marker(comparison, figure, marks, text) for figure in figures]
    cells += [lambda row, cell=cell: written(cell(row)) for _, cell in extra]
    for group, title in GROUPS.items():
        if rows := comparison.group(group):
            yield title, [(row, [cell(row) for cell in cells]) for row in rows]


def number(
    value: float | None, digits: int, scale: float = 1, *, none: str = "–"
) -> str:
    """A figure as it is printed; a dash where there is none."""
    return none if value is None else f"{scale * value:.{digits}f}"


def between(ends: Sequence[float] | None) -> str:
    """A range in per cent."""
    return "–" if not ends else " to ".join(number(end, 1, 100) for end in ends)


def retention(row: Row) -> str:
    """Both conventions in per cent."""
    both = (row["retention"][c] for c in ("mean_of_ratios", "ratio_of_averages"))
    first, second = (number(value, 1, 100) for value in both)
    return first if first == second == "–" else f"{first} ({second})"


#: What LaTeX reads as something else, or, as brackets and stars where a row begins, may read so.
_ESCAPES = str.maketrans(
    {
        **{character: "\\" + character for character in "&%$#_{}"},
        **{character: f"{{{character}}}" for character in "[*"},
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "<": "\\textless{}",
        ">": "\\textgreater{}",
        "|": "\\textbar{}",
        "–": "--",
        "\n": " ",
    }
)


def escaped(text: str) -> str:
    """Text escaped for LaTeX, in one line."""
    return text.translate(_ESCAPES)


def _pipe(cells: Sequence[str]) -> str:
    plain = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "| " + " | ".join(plain) + " |"


def _tex(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
