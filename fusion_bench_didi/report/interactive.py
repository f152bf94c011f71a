"""The same plots for the page, by plotly: tap or point at anything for its figures."""

import numpy as np
from plotly import graph_objects as go

from .comparison import Comparison, kind, percent
from .modules import KIND_COLORS, Place, RankTable, energy_lines
from .page_labels import annotations
from .plots import STORAGE_AXIS, family_label, short_name, zoom_from
from .style import KINDS, RANK_COLORS, color

_LOOK = dict(
    template="plotly_white",
    font=dict(family="system-ui, sans-serif", size=13),
    margin=dict(l=10, r=10, t=20, b=10),
    legend=dict(orientation="h", yanchor="bottom", y=1.0, x=0),
    hoverlabel=dict(align="left"),
)
_MENU = dict(
    x=0, xanchor="left", y=1.0, yanchor="bottom", pad=dict(b=8), showactive=True
)
_BELOW_MENU = _LOOK | {"margin": dict(l=10, r=10, t=60, b=10)}


def figures(comparison: Comparison) -> dict[str, go.Figure]:
    """By the names of the printed plots; only those for which the rows tell enough."""
    made = {
        "accuracy_vs_storage": accuracy_vs_storage(comparison),
        "accuracy_by_task": accuracy_by_task(comparison),
        "ranks": ranks(comparison),
        "energy_kept": energy(comparison),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def accuracy_vs_storage(comparison: Comparison) -> go.Figure | None:
    """Square roots on the axis, as in print: plotly has no such scale, so ticks say what they stand for."""
    rows = comparison.good
    if not rows:
        return None
    figure = go.Figure()
    for name, mine in _traces(rows):
        shade, _, symbol, label = KINDS[name]
        figure.add_scatter(
            x=[r["x_excl"] ** 0.5 for r in mine],
            y=[100 * r["average"] for r in mine],
            mode="lines+markers" if mine[0]["family"] else "markers",
            marker=dict(color=shade, symbol=symbol, size=11),
            line=dict(color=shade, dash="dash" if name == "variant" else "solid"),
            name=family_label(name, mine, label),
            error_y=_bars(mine),
            text=[_told(r) for r in mine],
            hovertemplate="%{text}<extra></extra>",
        )
    most = max(r["x_excl"] for r in rows)
    ticks = [t for t in (0, 0.25, 1, 2, 4, 8, 14, 20) if t <= 1.05 * most]
    figure.update_xaxes(
        tickvals=[t**0.5 for t in ticks],
        ticktext=[f"{t:g}" for t in ticks],
        tickangle=0,
        title=STORAGE_AXIS.replace(", ", "<br>"),
    )
    values = [100 * r["average"] for r in rows]
    whole = _padded(min(values), max(values))
    low = zoom_from(comparison)
    near = whole if low is None else (low, max(values) + 0.12 * (max(values) - low))
    across = (-0.06 * most**0.5, 1.12 * most**0.5)
    named = _annotations(rows, comparison, across, near)
    figure.update_xaxes(range=across)
    title = comparison.worded("average accuracy (%)")
    figure.update_yaxes(title=title, range=near, title_standoff=4)
    figure.update_layout(annotations=named, height=570, hovermode="closest", **_LOOK)
    if low is not None:
        views = {
            "near the top": {"yaxis.range": near, "annotations": named},
            "all methods": {"yaxis.range": whole, "annotations": []},
        }
        buttons = [dict(label=k, method="relayout", args=[v]) for k, v in views.items()]
        menu = _MENU | {"x": 1, "xanchor": "right", "yanchor": "top", "y": -0.05}
        figure.update_layout(updatemenus=[dict(buttons=buttons, **menu)])
    return figure


def _bars(rows) -> dict | None:
    """From the least to the greatest average over seeds."""
    ends = [r.get("over_seeds") or (r["average"], r["average"]) for r in rows]
    if not any(r.get("over_seeds") for r in rows):
        return None
    return dict(
        array=[100 * (high - r["average"]) for r, (_, high) in zip(rows, ends)],
        arrayminus=[100 * (r["average"] - low) for r, (low, _) in zip(rows, ends)],
        symmetric=False,
        thickness=1.4,
        width=0,
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _annotations(rows, comparison: Comparison, across, near) -> list[dict]:
    """Names of the points in view."""
    seen = [r for r in rows if near[0] <= 100 * r["average"] <= near[1]]
    kinds = [kind(r) for r in seen]
    return annotations(
        [(r["x_excl"] ** 0.5, 100 * r["average"]) for r in seen],
        [short_name(r, comparison) for r in seen],
        [None if k == "reference" else color(k) for k in kinds],
        [k == "ours" for k in kinds],
        across,
        near,
    )


def _traces(rows) -> list[tuple[str, list]]:
    """Rows of one kind and family together, in the order of the legend."""
    found: dict[tuple, list] = {}
    for row in sorted(rows, key=lambda r: r["x_excl"]):
        found.setdefault((kind(row), row["family"]), []).append(row)
    order = sorted(found, key=lambda key: list(KINDS).index(key[0]))
    return [(name, found[name, family]) for name, family in order]


def _told(row) -> str:
    low, high = row.get("over_seeds") or (None, None)
    spread = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f} over seeds)"
    return (
        f"<b>{row['method']}</b><br>average {100 * row['average']:.1f} %{spread}<br>"
        f"stored {row['x_excl']:.2f} (with backbone {row['x_incl']:.2f})"
    )


def accuracy_by_task(comparison: Comparison) -> go.Figure | None:
    """Bars of one task at a time; the menu chooses."""
    rows = comparison.good
    if not rows:
        return None
    tasks = ["average", *comparison.tasks]
    values = {task: [percent(row, task) for row in rows] for task in tasks}
    figure = go.Figure(
        go.Bar(
            x=values["average"],
            y=[r["method"] for r in rows],
            orientation="h",
            marker_color=[color(kind(r)) for r in rows],
            texttemplate="%{x:.1f}",
            hovertemplate="%{y}: %{x:.2f} %<extra></extra>",
        )
    )
    buttons = [
        dict(label=task, method="restyle", args=[{"x": [values[task]]}])
        for task in tasks
    ]
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title=comparison.worded("accuracy (%)"), rangemode="tozero")
    return figure.update_layout(
        height=120 + 22 * len(rows),
        updatemenus=[dict(buttons=buttons, **_MENU)],
        **_BELOW_MENU,
    )


def ranks(comparison: Comparison) -> go.Figure | None:
    """The rank heat map of one model at a time; the menu chooses the budget."""
    rows = comparison.with_ranks()
    if not rows:
        return None
    shown = comparison.shown_in_detail()
    figure = go.Figure()
    for row in rows:
        table = RankTable.of(row["ranks"])
        blocks, lines, modules = table.values.shape
        gap = np.full((blocks, lines, 1), np.nan)  # an empty column after each block
        values = np.concatenate([table.values, gap], axis=2)
        places = [(b, p) for b in table.blocks for p in [*table.modules, None]]
        figure.add_heatmap(
            z=values.transpose(1, 0, 2).reshape(lines, -1),
            x=[[b for b, _ in places], [_short(p) for _, p in places]],
            y=table.lines,
            colorscale=RANK_COLORS,
            colorbar=dict(title="rank", thickness=12),
            xgap=1,
            ygap=1,
            visible=row is shown,
            customdata=[[_told_place(*place) for place in places]] * lines,
            hovertemplate="%{customdata}<br>%{y}: rank %{z}<extra></extra>",
        )
    buttons = [
        dict(
            label=row["method"],
            method="update",
            args=[{"visible": [other is row for other in rows]}],
        )
        for row in rows
    ]
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(tickfont_size=10, dividerwidth=1)
    return figure.update_layout(
        height=190 + 32 * lines,
        updatemenus=[dict(buttons=buttons, active=rows.index(shown), **_MENU)],
        **_BELOW_MENU,
    )


def _told_place(block: str, place: Place | None) -> str:
    return f"{block}<br>{place.module} ({place.kind})" if place else block


def _short(place: Place | None) -> str:
    if place is None:
        return " "
    return f'<span style="color:{KIND_COLORS[place.kind]}">{place.short}</span>'


def energy(comparison: Comparison) -> go.Figure | None:
    """Energy kept per layer: mean and range over tasks."""
    row = comparison.shown_in_detail()
    if row is None or not row.get("energy_kept"):
        return None
    figure = go.Figure()
    for line in energy_lines(row["energy_kept"]):
        mean = 100 * np.array(line.mean)
        figure.add_scatter(
            x=line.layers,
            y=mean,
            mode="lines+markers",
            name=line.kind,
            line_color=KIND_COLORS[line.kind],
            error_y=dict(
                array=100 * np.array(line.high) - mean,
                arrayminus=mean - 100 * np.array(line.low),
                symmetric=False,
                thickness=1,
            ),
            hovertemplate=f"{line.kind}, layer %{{x}}: %{{y:.1f}} %<extra></extra>",
        )
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="energy kept (%)")
    return figure.update_layout(height=360, **_LOOK)
