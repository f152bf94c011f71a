"""Tables, plots and the page, from a comparison that was made up."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from figure_boxes import overlapping

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402
from PIL import Image  # noqa: E402

from fusion_bench_didi.report import labels, page, plots, tables, write_report
from fusion_bench_didi.report.comparison import Comparison, best_two
from fusion_bench_didi.report.modules import Place, RankTable, energy_lines
from fusion_bench_didi.report.style import look
from fusion_bench_didi.report.terminal import print_table

TASKS = ["digits", "signs_100%", "faces"]
TENSORS = [
    "vision_model.embeddings.patch_embedding.weight",
    *(
        f"vision_model.encoder.layers.{layer}.{module}.weight"
        for layer in (0, 1, 10)
        for module in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    ),
]


def row(method, group, average, x, **more) -> dict:
    return {
        "method": method,
        "group": group,
        "family": None,
        "error": None,
        "accuracy": {task: average + 0.02 * i for i, task in enumerate(TASKS)},
        "average": average + 0.02,
        "retention": {"mean_of_ratios": 0.9, "ratio_of_averages": 0.91},
        "x_excl": x,
        "x_incl": x + 1,
        "bytes_excl": int(1000 * x),
        "bytes_incl": int(1000 * x) + 1000,
        "published_x": 4.0,
        "budget": None,
        "seconds": 1.5,
        "peak_gb": 1.25,
        "added_gb": 0.25,
        "uses_data": "none",
        "routing": "none",
        "notes": "a note | with a bar & more",
        **more,
    }


def synthetic() -> dict:
    ranks = {
        "shared": {name: 3 for name in TENSORS},
        "experts": {
            task: {name: i for name in TENSORS} for i, task in enumerate(TASKS)
        },
    }
    energy = {name: [0.8, 0.9, 0.95] for name in TENSORS}
    own = {"family": "DiDi", "routing": "oracle", "ranks": ranks, "energy_kept": energy}
    nothing = dict.fromkeys(TASKS)
    failed = {
        "accuracy": nothing,
        "average": None,
        "retention": dict.fromkeys(("mean_of_ratios", "ratio_of_averages")),
        "error": "ValueError: no <images>",
        **dict.fromkeys(("x_excl", "x_incl", "seconds", "peak_gb"), None),
    }
    rows = [
        row("Pre-trained", "reference", 0.4, 0.0),
        row("Individuals", "reference", 0.8, 3.0, routing="oracle"),
        *(row(f"Static_{i}", "static", 0.5 + 0.01 * i, 1.0) for i in range(6)),
        row("Broken", "static", 0, 0) | failed,
        row("EMR", "dynamic", 0.7, 1.25, routing="oracle"),
        *(
            row(f"DiDi {x}", "dynamic", 0.6 + 0.1 * x, x, **own)
            for x in (0.24, 0.5, 1.0, 1.4)
        ),
    ]
    return {
        "format": 1,
        "tasks": TASKS,
        "retention": {"mean_of_ratios": "...", "ratio_of_averages": "..."},
        "unit_bytes": 1000,
        "rows": rows,
        "config": {},
        "versions": {"torch": "2"},
    }


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return Comparison(synthetic())


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The directory of a report, made as a user would anew."""
    directory = tmp_path_factory.mktemp("report")
    (directory / "comparison.json").write_text(json.dumps(synthetic()))
    command = [sys.executable, "-m", "fusion_bench_didi.report", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {str(f) for f in directory.iterdir()} - {
        str(directory / "comparison.json")
    }
    return directory


def test_every_format_is_there(written):
    names = {f.name for f in written.iterdir()}
    assert {f"comparison.{s}" for s in ("json", "csv", "md", "tex", "html")} < names
    for plot in ("accuracy_vs_storage", "accuracy_by_task", "ranks", "energy_kept"):
        assert {f"{plot}.png", f"{plot}.svg"} < names
        assert Image.open(written / f"{plot}.png").size[0] > 500


def test_csv_is_unrounded_and_complete(comparison):
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(comparison))))
    assert len(lines) == len(comparison.rows)
    assert float(lines[9]["x_excl"]) == 1.25
    assert (
        float(lines[-1]["accuracy_faces"]) == comparison.rows[-1]["accuracy"]["faces"]
    )
    assert lines[8]["error"].startswith("ValueError") and lines[8]["average"] == ""


def test_markdown_marks_the_best_two_of_a_group(comparison):
    text = tables.as_markdown(comparison)
    lines = {
        line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line
    }
    assert lines["Static_5"].count("**") == 2 * 4  # three tasks and the average
    assert lines["Static_4"].count("_") - 1 == 2 * 4
    assert "**" not in lines["Static_3"] and "**" not in lines["Individuals"]
    assert "**" in lines["DiDi 1.4"] and "_" in lines["EMR"].replace("_100", "")
    assert "failed: ValueError" in lines["Broken"]
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = {len(re.split(r"(?<!\\)\|", line)) for line in table}
    assert len(cells) == 1


def test_latex_is_balanced_and_escaped(comparison):
    text = tables.as_latex(comparison)
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 1
    assert "\\textbf{" in text and "\\underline{" in text
    body = [line for line in text.splitlines() if line.endswith("\\\\")]
    full = [line for line in body if "multicolumn" not in line]
    assert len({len(re.split(r"(?<!\\)&", line)) for line in full}) == 1
    assert all(line.count("{") == line.count("}") for line in body)
    assert "signs\\_100\\%" in text and "Static_5" not in text


@pytest.mark.parametrize(
    "text, latex",
    [
        ("_\\%", "\\_\\textbackslash{}\\%"),
        ("{~^}", "\\{\\textasciitilde{}\\textasciicircum{}\\}"),
        ("a & b # $", "a \\& b \\# \\$"),
        ("<b>|", "\\textless{}b\\textgreater{}\\textbar{}"),
        ("[2] *", "{[}2] {*}"),  # at the beginning of a row they are the row's end's
        ("two\nlines", "two lines"),
    ],
)
@pytest.mark.parametrize("column", ["method", "routing", "notes"])
def test_no_character_is_read_as_latex(text, latex, column):
    data = synthetic()
    data["rows"][0] |= {column: text}
    whole = tables.as_latex(Comparison(data))
    assert latex in whole and text not in whole
    assert "\\textbf{" in whole and "\\underline{" in whole


def test_lines_of_a_label_stay_in_their_row():
    data = synthetic()
    data["rows"][0] |= {"method": "two\nlines", "notes": "of\nmine"}
    assert "| two lines |" in tables.as_markdown(Comparison(data))


def test_best_two_share_a_place_when_printed_alike():
    rows = [
        {"method": m, "error": None, "v": v}
        for m, v in zip("abcd", (0.5, 0.50001, 0.4, None))
    ]
    assert best_two(rows, lambda r: r["v"]) == ({"a", "b"}, {"c"})


def test_labels_do_not_overlap():
    """Thirty points, twelve of them on one spot of the storage axis."""
    figure, axes = plt.subplots(figsize=(9, 5.6))
    draw = np.random.default_rng(0)
    points = [(1.0, 40 + 2.2 * i) for i in range(12)]
    points += [tuple(p) for p in draw.uniform((0, 20), (8, 90), (18, 2))]
    axes.plot(*zip(*points), "o")
    boxes = labels.place(axes, points, [f"Method {i}" for i in range(30)], ["k"] * 30)
    plt.close(figure)
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            common = Bbox.intersection(a, b)
            assert common is None or common.width * common.height == 0


@pytest.mark.parametrize("name", plots.PICTURES)
def test_no_text_of_a_picture_lies_on_another(comparison, name):
    with look():
        figure = plots.PICTURES[name](comparison)
    assert not overlapping(figure)


def test_the_same_comparison_gives_the_same_pictures(comparison, tmp_path):
    written = []
    for name in "ab":
        (tmp_path / name).mkdir()
        files = plots.write(comparison, tmp_path / name)
        written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1] and len(written[0]) == 8


@pytest.mark.parametrize(
    "name, layer, module, kind",
    [
        ("vision_model.encoder.layers.3.self_attn.q_proj.weight", 3, "q", "attention"),
        ("model.visual.transformer.resblocks.11.attn.in_proj_weight", 11, "in", "attention"),
        ("transformer.h.0.mlp.c_fc.weight", 0, "fc", "MLP"),
        ("model.layers.31.mlp.down_proj.weight", 31, "down", "MLP"),
        ("vision_model.embeddings.patch_embedding.weight", None, "patch_embedding", "other"),
    ],
)  # fmt: skip
def test_places_of_tensors(name, layer, module, kind):
    place = Place.of(name)
    assert (place.layer, place.short, place.kind) == (layer, module, kind)


def test_rank_table(comparison):
    table = RankTable.of(comparison.shown_in_detail()["ranks"])
    assert table.blocks == ["shared", *TASKS]
    assert table.lines == ["patch emb.", "layer 0", "layer 1", "layer 10"]
    assert [p.short for p in table.modules] == ["q", "out", "fc1", "fc2"]
    assert table.values.shape == (4, 4, 4)
    assert (table.values[0] == 3).all() and (table.values[3] == 2).all()


def test_energy_lines_are_means_and_ranges():
    attention, mlp = energy_lines({name: [0.8, 0.9, 1.0] for name in TENSORS})
    assert (attention.kind, mlp.kind) == ("attention", "MLP")
    assert attention.layers == ["0", "1", "10"]
    assert attention.mean == pytest.approx([0.9] * 3)
    assert (mlp.low[0], mlp.high[0]) == (0.8, 1.0)


def test_a_comparison_without_ranks_or_figures_still_has_a_report(tmp_path):
    data = synthetic()
    data["rows"] = [r for r in data["rows"] if r["error"]]
    bare = Comparison(data)
    assert plots.draw(bare) == {}
    assert len(tables.write(bare, tmp_path)) == 3


def test_figures_that_are_no_shares_fail_their_rows_and_not_the_report(tmp_path):
    told = synthetic()
    task, odd = told["tasks"][0], (float("nan"), float("inf"), 93.75)
    for row, value in zip(told["rows"][2:], odd):
        row["accuracy"][task] = row["average"] = value
        row["retention"] = dict.fromkeys(row["retention"], value)
    (tmp_path / "comparison.json").write_text(json.dumps(told))
    write_report(tmp_path)
    failed = Comparison.read(tmp_path / "comparison.json").failed
    assert {r["method"] for r in told["rows"][2:5]} <= {r["method"] for r in failed}
    table = (tmp_path / "comparison.md").read_text()
    for value in odd:
        assert f"accuracy of {task} is {value:g}" in table


def test_words_on_accuracies_stay_where_figures_are_some(comparison):
    text = "Accuracies, Accuracy and accuracy"
    assert comparison.worded(text) == text


def test_what_figures_are_is_said_wherever_they_are(tmp_path, capsys):
    told = synthetic()
    for row in told["rows"]:
        row["metrics"] = dict.fromkeys(told["tasks"], "f1")
    (tmp_path / "comparison.json").write_text(json.dumps(told))
    write_report(tmp_path)
    print_table(told)
    texts = [capsys.readouterr().out]
    for name in ("csv", "md", "html"):
        text = (tmp_path / f"comparison.{name}").read_text()
        texts.append(text[text.index("<h1>") :] if name == "html" else text)
    for text in texts:
        assert "f1" in text
        assert not re.search(r"accurac(y|ies)(?!_vs|_by)", text, re.IGNORECASE)


def test_plots_of_an_earlier_report_do_not_outlive_it(comparison, tmp_path):
    (tmp_path / "mine.svg").write_text("mine")
    assert plots.write(comparison, tmp_path)
    failed = {**row("EMR", "dynamic", 0.5, 1), "error": "no"}
    bare = Comparison({**comparison.data, "rows": [failed]})
    assert plots.write(bare, tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["mine.svg"]


def test_the_page_needs_no_network(written):
    """Nothing is fetched: no element with an address outside the page."""
    text = (written / "comparison.html").read_text()
    assert len(text) > 4e6  # both libraries are inside
    outside = re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.S)
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=\"(http|//)", text)
    assert not re.search(r"@import|url\(\s*['\"]?http", outside)
    assert "no &lt;images&gt;" in text or "no \\u003cimages" in text
    assert "<images>" not in outside


SEEN = """
<body style="margin:0"><iframe width="390" height="3600" style="border:0" src="{page}"></iframe><script>
const frame = document.querySelector('iframe');
const pause = (time) => new Promise(done => setTimeout(done, time));
frame.onload = async () => {{
  await pause(3000);
  const d = frame.contentDocument, all = (what) => [...d.querySelectorAll(what)];
  const methods = () => all('#summary tbody tr').map(row => row.cells[0].textContent);
  const heads = all('#summary thead th'), named = (name) => heads.find(h => h.textContent.trim() === name);
  const seen = {{
    width: d.documentElement.scrollWidth, tables: all('table.dataTable th.dt-orderable-asc').length,
    plots: all('.js-plotly-plot .main-svg').length, rows: methods().length,
    references: frame.contentWindow.document.getElementById('accuracy_vs_storage').data[0].marker.color,
    storage: named('x excl.').getBoundingClientRect().right,
    named: all('.annotation').filter(a => frame.contentWindow.getComputedStyle(a).display != 'none').length,
  }};
  named('Average').click(); await pause(300); seen.rising = methods();
  named('Average').click(); await pause(300); seen.falling = methods();
  const search = d.querySelector('#summary_wrapper input[type=search]');
  search.value = 'static_'; search.dispatchEvent(new Event('input', {{bubbles: true}}));
  await pause(500); seen.found = methods();
  document.body.dataset.seen = JSON.stringify(seen);
}};
</script></body>
"""


def test_the_page_in_a_browser(written, tmp_path):
    """Headless Chromium, at the width of a phone: headings sort, search finds, storage is in view, plots are drawn."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    # Chromium's own window is never narrower than 500 pixels, a frame is.
    frame = tmp_path / "phone.html"
    frame.write_text(SEEN.format(page=f"file://{written}/comparison.html"))
    shot = tmp_path / "phone.png"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --allow-file-access-from-files "
        f"--hide-scrollbars --virtual-time-budget=8000 --window-size=500,3600 --user-data-dir={tmp_path}/profile"
    ).split()

    def run(*more: str) -> str:
        command = [browser, *flags, *more, f"file://{frame}"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120
        ).stdout

    seen = re.search(r'data-seen="([^"]*)"', run("--dump-dom", f"--screenshot={shot}"))
    found = json.loads(seen[1].replace("&quot;", '"'))
    assert found["references"] == "#222222"  # on a light screen
    assert found["width"] <= 390 and found["storage"] <= 390
    rows = synthetic()["rows"]
    assert found["rows"] == len(rows)
    assert found["named"] == 0, "no room for names of points"
    assert found["tables"] > 10
    assert found["plots"] >= 4
    rising = sorted((r for r in rows if not r["error"]), key=lambda r: r["average"])
    names = [r["method"] for r in rising]
    assert [m for m in found["rising"] if m != "Broken"] == names
    assert [m for m in found["falling"] if m != "Broken"] == names[::-1]
    assert set(found["found"]) == {f"Static_{i}" for i in range(6)}
    if not shot.is_file():
        run(f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("L"))[:, :390]
    written_lines = (pixels < 200).any(axis=1)
    assert written_lines.mean() > 0.4, "most of the page is blank"


def test_the_page_says_how_it_was_made_and_gives_its_figures(comparison):
    found = page.render(Comparison(synthetic() | {"made": {"command": "didi compare -o <out>", "date": "2026-01-02 03:04 UTC"}}))  # fmt: skip
    assert "<dd>didi compare -o &lt;out&gt;</dd>" in found and "2026-01-02" in found
    given = dict(re.findall(r'download="comparison\.(\w+)" href="data:[^,]*,([^"]*)"', found))  # fmt: skip
    assert base64.b64decode(given["csv"]).decode() == tables.as_csv(comparison)
    assert base64.b64decode(given["tex"]).decode() == tables.as_latex(comparison)
    cells = page.summary_frame(comparison).set_index("Method")["Average"]
    assert cells["Static_5"].startswith("<b>") and cells["Static_4"].startswith("<u>")
    assert "<" not in cells["Individuals"]
