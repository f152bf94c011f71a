"""One HTML page with everything in it: sortable tables and interactive plots, and no network.

The libraries' own exports do the work: itables (DataTables) for the tables, plotly for the plots; both are put into the
page. In print, the plots are the SVG files' pictures, which carry their labels.
"""

import html
import io
import re
from pathlib import Path

import pandas as pd
from itables.javascript import generate_init_offline_itables_html, to_html_datatable
from itables.options import dt_bundle
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from ..files import write_whole
from . import interactive, plots
from .comparison import Comparison
from .style import look
from .tables import LEGEND, columns

_TITLES = {
    "accuracy_vs_storage": (
        "Accuracy against storage",
        "Up is better, left is smaller. Methods of one family are joined.",
    ),
    "accuracy_by_task": ("Accuracy by task", "Choose a task in the menu."),
    "ranks": (
        "Ranks",
        "Shared part first, then one block per expert; attention in blue, MLP in orange. Scroll sideways on a phone.",
    ),
    "energy_kept": (
        "Energy kept",
        "Share of the task vectors' squared norm that the stored modules reproduce; bars: range over tasks.",
    ),
}


def write(comparison: Comparison, directory: Path) -> Path:
    """``comparison.html``."""
    file = directory / "comparison.html"
    write_whole(file, render(comparison))
    return file


def render(comparison: Comparison) -> str:
    """The page."""
    printed = _svgs(comparison)
    sections = [
        _figure(name, figure, printed.get(name, ""))
        for name, figure in interactive.figures(comparison).items()
    ]
    return _PAGE.format(
        style=_STYLE,
        plotly=get_plotlyjs(),
        tables=generate_init_offline_itables_html(dt_bundle),
        lead=_lead(comparison),
        summary=_table(summary_frame(comparison), "summary"),
        tasks=_table(task_frame(comparison), "tasks"),
        legend=html.escape(LEGEND),
        figures="\n".join(sections),
        facts=_facts(comparison),
    )


def summary_frame(comparison: Comparison) -> pd.DataFrame:
    """What the first table shows."""
    lines = []
    for row in comparison.rows:
        line = {"Method": row["method"], "Group": row["group"]}
        line["Average"] = _rounded(row["average"], 1, 100)
        line["Retention"] = _rounded(row["retention"]["mean_of_ratios"], 1, 100)
        line["(of averages)"] = _rounded(row["retention"]["ratio_of_averages"], 1, 100)
        for head, key, digits in (
            ("x excl.", "x_excl", 2),
            ("x incl.", "x_incl", 2),
            ("x printed", "published_x", 2),
            ("Merge s", "seconds", 1),
            ("Peak GB", "peak_gb", 2),
        ):
            line[head] = _rounded(row[key], digits)
        line |= {head: cell(row) for head, cell in columns()[-2:]}
        line["Notes"] = f"failed: {row['error']}" if row["error"] else row["notes"]
        lines.append(line)
    return pd.DataFrame(lines, dtype=object)


def task_frame(comparison: Comparison) -> pd.DataFrame:
    """What the second table shows."""
    return pd.DataFrame(
        [
            {
                "Method": row["method"],
                **{t: _rounded(row["accuracy"][t], 1, 100) for t in comparison.tasks},
                "Average": _rounded(row["average"], 1, 100),
            }
            for row in comparison.rows
        ],
        dtype=object,
    )


def _rounded(value: float | None, digits: int, scale: float = 1) -> str:
    """A figure; a hyphen, which DataTables sorts as an empty cell, where there is none."""
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _table(frame: pd.DataFrame, name: str) -> str:
    words = ("Method", "Group", "Data", "Routing", "Notes")
    figures = [i for i, head in enumerate(frame.columns) if head not in words]
    return to_html_datatable(
        frame,
        connected=False,
        table_id=name,
        paging=False,
        layout=dict.fromkeys(("topStart", "topEnd", "bottomStart", "bottomEnd")),
        ordering=True,
        order=[],
        showIndex=False,
        columnDefs=[{"targets": figures, "className": "dt-right", "type": "num"}],
        classes="display compact nowrap",
        style="width:100%",
    )


def _figure(name: str, figure, printed: str) -> str:
    title, told = _TITLES[name]
    plot = to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    return (
        f'<section class="{name}"><h2 class="screen">{title}</h2><p class="screen">{told}</p>'
        f'<div class="screen"><div class="plot">{plot}</div></div><div class="print">{printed}</div></section>'
    )


def _svgs(comparison: Comparison) -> dict[str, str]:
    """The printed plots, as elements of the page."""
    found = {}
    with look():
        for name, picture in plots.draw(comparison).items():
            out = io.StringIO()
            picture.savefig(out, format="svg", metadata={"Date": None})
            text = out.getvalue()
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
    versions = comparison.data["versions"]
    return html.escape(", ".join(f"{k} {v}" for k, v in versions.items()))


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1400px; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; color: #555; }
table { font-size: .85rem; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
.table th:first-child, .table td:first-child { position: sticky; left: 0; background: #fff; z-index: 1; }
#summary td:last-child { white-space: normal; min-width: 15rem; }
div.screen { overflow-x: auto; } .ranks .plot { min-width: 900px; }
.print { display: none; }
@media (max-width: 600px) { body { padding: .6rem; font-size: 15px; } table { font-size: .78rem; }
  #summary td:last-child { white-space: nowrap; } }
@media print {
  @page { size: A4 landscape; margin: 10mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .screen { display: none; } .print { display: block; } .print svg { width: 100%; height: auto; max-height: 165mm; }
  .table { overflow: visible; } table.dataTable { font-size: 6.5pt; } table.dataTable td { white-space: normal !important; padding: 1px 3px !important; }
  #summary td:last-child { min-width: 0; } .dt-column-order { display: none; } p.screen { display: none; }
  section { break-inside: avoid; } tr { break-inside: avoid; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Model merging, side by side</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
{tables}
<h1>Model merging, side by side</h1>
<p>{lead}</p>
<p class="screen">Accuracies in %. Tap a heading to sort.</p>
<div class="table">{summary}</div>
<p><small>{legend}</small></p>
<section><h2>Accuracy by task, in %</h2>
<div class="table">{tasks}</div></section>
{figures}
<p><small>{facts}</small></p>
</body>
</html>
"""
