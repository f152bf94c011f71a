"""One HTML page with everything in it: sortable tables and interactive plots, and no network.

The libraries' own exports do the work: itables (DataTables) for the tables, plotly for the plots; both are put into the
page. In print, the plots are the SVG files' pictures, which carry their labels.
"""

import base64
import html
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from itables.javascript import generate_init_offline_itables_html, to_html_datatable
from itables.options import dt_bundle
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from ..files import write_whole
from . import findings, interactive, plots
from .comparison import Comparison, FigureOf, marker
from .page_template import PAGE, SCRIPT, STYLE
from .style import drawn, look
from .tables import LEGEND, WORDS, as_csv, as_latex, number

_TOLD = {
    "accuracy_vs_storage": "Up is better, left is smaller. Methods of one family are joined.",
    "accuracy_by_task": "Choose a task in the menu.",
    "ranks": "Shared part first, then one block per expert; attention in blue, MLP in orange. Scroll sideways on a phone.",
    "energy_kept": "Share of the task vectors' squared norm that the stored modules reproduce; bars: range over tasks.",
}


def write(comparison: Comparison, directory: Path) -> Path:
    """Write ``comparison.html``."""
    file = directory / "comparison.html"
    write_whole(file, render(comparison))
    return file


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    printed = _svgs(comparison)
    sections = [
        _figure(name, figure, findings.OF[name](comparison), printed.get(name, ""))
        for name, figure in interactive.figures(comparison).items()
    ]
    return PAGE.format(
        style=STYLE,
        plotly=get_plotlyjs(),
        tables=generate_init_offline_itables_html(dt_bundle),
        lead=_lead(comparison),
        summary=_table(summary_frame(comparison), "summary"),
        by_task=html.escape(comparison.worded("Accuracy by task, in %")),
        figures_in=html.escape(comparison.worded("Accuracies in %")),
        tasks=_table(task_frame(comparison), "tasks"),
        legend=html.escape(comparison.worded(LEGEND)),
        figures="\n".join(sections),
        downloads=_downloads(comparison),
        facts=_facts(comparison),
        script=SCRIPT,
    )


def summary_frame(comparison: Comparison) -> pd.DataFrame:
    """The first table: what decides comes first, for it is all that a phone has room for."""
    marked = _marked(comparison, lambda row: row["average"])
    lines = []
    for row in comparison.rows:
        line = {"Method": html.escape(row["method"])}
        line["x excl."] = _rounded(row["x_excl"], 2)
        line["Average"] = marked(row)
        if comparison.over_seeds:
            ends = [_rounded(v, 1, 100) for v in row.get("over_seeds") or ()]
            line["Over seeds"] = " to ".join(ends)
        for head, value, digits, scale in (
            ("Retention", row["retention"]["mean_of_ratios"], 1, 100),
            ("(of averages)", row["retention"]["ratio_of_averages"], 1, 100),
            ("x incl.", row["x_incl"], 2, 1),
            ("x printed", row["published_x"], 2, 1),
            ("Merge s", row["seconds"], 1, 1),
            ("Peak GB", row["peak_gb"], 2, 1),
        ):
            line[head] = _rounded(value, digits, scale)
        line["Group"] = row["group"]
        line |= {head: html.escape(cell(row)) for head, cell in WORDS}
        notes = f"failed: {row['error']}" if row["error"] else row["notes"]
        line["Notes"] = html.escape(notes)
        lines.append(line)
    return pd.DataFrame(lines, dtype=object)


def task_frame(comparison: Comparison) -> pd.DataFrame:
    """The second table: accuracy by task."""
    marked = {t: _marked(comparison, figure) for t, figure in comparison.accuracies()}
    return pd.DataFrame(
        [
            {"Method": html.escape(row["method"])}
            | {html.escape(head): mark(row) for head, mark in marked.items()}
            for row in comparison.rows
        ],
        dtype=object,
    )


def _marked(comparison: Comparison, figure: FigureOf) -> Callable[[Mapping], str]:
    """Accuracies as cells; best of a group bold, second best underlined."""
    text = partial(_rounded, digits=1, scale=100)
    return marker(comparison, figure, ("<b>{}</b>", "<u>{}</u>"), text)


#: A figure; a hyphen, which DataTables sorts as an empty cell, where there is none.
_rounded = partial(number, none="-")


def _table(frame: pd.DataFrame, name: str) -> str:
    words = ("Method", "Over seeds", "Group", "Data", "Routing", "Notes")
    figures = [i for i, head in enumerate(frame.columns) if head not in words]
    nowhere = dict.fromkeys(("topStart", "topEnd", "bottomStart", "bottomEnd"))
    return to_html_datatable(
        frame,
        connected=False,
        table_id=name,
        paging=False,
        layout=nowhere | {"topStart": "search"},
        ordering=True,
        order=[],
        showIndex=False,
        columnDefs=[{"targets": figures, "className": "dt-right", "type": "html-num"}],
        classes="display compact nowrap",
        style="width:100%",
        text_in_header_can_be_selected=False,  # else only the arrows of a heading sort
        allow_html=True,  # cells are escaped above; marks of the best are not
    )


def _downloads(comparison: Comparison) -> str:
    """Links that hold what they give."""
    files = {"csv": ("text/csv", as_csv), "tex": ("text/x-tex", as_latex)}
    return " ".join(
        f'<a download="comparison.{ending}" href="data:{kind};base64,{base64.b64encode(make(comparison).encode()).decode()}">'
        f"{ending.upper()}</a>"
        for ending, (kind, make) in files.items()
    )


def _figure(name: str, figure, title: str, printed: str) -> str:
    plot = to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    return (
        f'<section class="{name}"><h2 class="screen">{html.escape(title)}</h2><p class="screen">{_TOLD[name]}</p>'
        f'<div class="screen"><div class="plot">{plot}</div></div><div class="print">{printed}</div></section>'
    )


def _svgs(comparison: Comparison) -> dict[str, str]:
    """The printed plots, as elements of the page."""
    found = {}
    with look():
        for name, picture in plots.draw(comparison).items():
            text = drawn(picture, "svg").decode()
            text = text[text.index("<svg") :]
            # several pictures in one page must not share names
            text = re.sub(r'\bid="', f'id="{name}-', text)
            found[name] = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    return found


def _lead(comparison: Comparison) -> str:
    failed = [html.escape(r["method"]) for r in comparison.failed]
    return (
        f"{len(comparison.rows)} methods on {len(comparison.tasks)} tasks: {html.escape(', '.join(comparison.tasks))}."
        + (f" <b>Failed: {', '.join(failed)}.</b>" if failed else "")
    )


def _facts(comparison: Comparison) -> str:
    """How it was made, as far as the file says."""
    data, config = comparison.data, comparison.config
    made = data.get("made", {})
    told = {
        "Command": made.get("command"),
        "Date": made.get("date"),
        **{head: _pool(config.get(key)) for head, key in (("Models", "modelpool"), ("Tasks", "taskpool"))},
        "Seed": config.get("seed"),
        "Versions": ", ".join(f"{k} {v}" for k, v in data["versions"].items()),
    }  # fmt: skip
    return "".join(
        f"<dt>{head}</dt><dd>{html.escape(str(value))}</dd>"
        for head, value in told.items()
        if value not in (None, "")
    )


def _pool(config: Mapping[str, Any] | None) -> str:
    """Class of a pool and where its models or data are, as far as that is short."""
    if not config:
        return ""
    plain = [f"{k} {v}" for k, v in config.items() if k[0] != "_" and isinstance(v, (str, int))]  # fmt: skip
    return " ".join([str(config.get("_target_", "")).rpartition(".")[2], ", ".join(plain)])  # fmt: skip
