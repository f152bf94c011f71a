"""The page around its tables and plots: style sheet, script, and elements."""

STYLE = """
:root { --ink: #222; --quiet: #555; --paper: #fff; --link: #0072b2; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --quiet: #aaa; --paper: #16181c; --link: #56b4e9; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 1400px; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; color: var(--quiet); } a { color: var(--link); }
dl { font-size: .85rem; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
table { font-size: .85rem; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; }
.table th:first-child, .table td:first-child { position: sticky; left: 0; background: var(--paper); z-index: 1; }
#summary td:last-child { white-space: normal; min-width: 15rem; }
div.screen { overflow-x: auto; } .ranks .plot { min-width: 900px; }
.print { display: none; }
@media (max-width: 760px) { .annotation { display: none; } }
@media (max-width: 600px) { body { padding: .6rem; font-size: 15px; } table { font-size: .78rem; }
  h1 { font-size: 1.25rem; } table.dataTable > thead > tr > th { padding: 4px 16px 4px 4px !important; }
  .table td:first-child { max-width: 8.5rem; overflow: hidden; text-overflow: ellipsis; }
  #summary td:last-child { white-space: nowrap; } }
@media print {
  @page { size: A4 landscape; margin: 10mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .screen, .dt-search { display: none; } .print { display: block; } .print svg { width: 100%; height: auto; max-height: 165mm; }
  .table { overflow: visible; } table.dataTable { font-size: 6.5pt; } table.dataTable td { white-space: normal !important; padding: 1px 3px !important; }
  #summary td:last-child { min-width: 0; } .dt-column-order { display: none; } p.screen { display: none; }
  section { break-inside: avoid; } tr { break-inside: avoid; }
}
"""

#: DataTables and plotly are told of a dark screen; style sheets hear of it by themselves.
SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function dress() {
  document.documentElement.classList.toggle('dark', dark.matches);
  const ink = dark.matches ? '#e4e4e4' : '#222222', line = dark.matches ? '#3a3d44' : '#e6e6e6';
  const seen = (color) => ['#222222', '#e4e4e4'].includes(color) ? ink : color;
  for (const plot of document.querySelectorAll('.js-plotly-plot')) {
    const axes = ['xaxis', 'yaxis'].flatMap(a => ['gridcolor', 'linecolor', 'zerolinecolor'].map(k => [`${a}.${k}`, line]));
    Plotly.relayout(plot, {paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', 'font.color': ink,
      ...Object.fromEntries(axes)});
    plot.data.forEach((trace, i) => {
      const color = trace.marker && trace.marker.color;
      if (color) Plotly.restyle(plot, {'marker.color': [Array.isArray(color) ? color.map(seen) : seen(color)]}, [i]);
    });
  }
}
dark.addEventListener('change', dress);
addEventListener('load', dress);
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Model merging, side by side</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
{tables}
<h1>Model merging, side by side</h1>
<p>{lead}</p>
<p class="screen">{figures_in}, best of a group <b>bold</b>, second <u>underlined</u>; stored beyond the backbone: x excl. Tap a
heading to sort. All figures: {downloads}</p>
<div class="table">{summary}</div>
<p><small>{legend}</small></p>
<section><h2>{by_task}</h2>
<div class="table">{tasks}</div></section>
{figures}
<dl>{facts}</dl>
<script>{script}</script>
</body>
</html>
"""
