"""docs/routing.md and its plot, from the results of ``python -m benchmarks.routing``."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.suites import NOTES
from fusion_bench_didi.report.style import headline, look, new_figure, save_figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = """# Routing

Who tells a dynamic model its task? `method=didi/routed` attaches a router to any of them, `method=didi/se_merging` is
SE-Merging, `taskpool=didi/mixed` evaluates them on one stream in which the images of all tasks are shuffled. A routed model
is evaluated by stock task pools without being given the task.

```bash
fusion_bench method=didi/routed modelpool=didi/demo taskpool=didi/mixed
fusion_bench method=didi/routed method@method.base_method=didi/twin method.router=mlp modelpool=didi/demo taskpool=didi/demo
fusion_bench method=didi/se_merging method@method.base_method=task_arithmetic modelpool=didi/demo taskpool=didi/demo
python -m benchmarks.routing --suite demo        # these tables
```

| router | finds the task by | needs | costs per batch | stores |
|---|---|---|---|---|
| `projection` | how strongly a layer's input excites each expert's leading right singular vectors | nothing; images for a head | the first block of the shared model, once more | nothing; its head |
| `representation` | how far merged model and expert t lie apart (SE-Merging) | nothing; images for a head | T + 1 forwards | nothing; its head |
| `mlp` | states of the shared model | unlabelled images of every task | blocks up to the layer, once more | the network |

A head (`discriminant`, in closed form, or `mlp`) is fitted to the router's features on images whose task is known; class
labels are never used. Times are processor time of one thread relative to the plain backbone on the same mixed batch of {batch}
images; "routing x" is what the router stores in units of one fine-tuned model (the towers here are very small, heads are not).

Routers look at layers that are called once, with one row per sample; experts, their gates and layers on windows of an image are
not, and where one is named, or a default (OPT flattens the tokens of a batch for its MLP), the error says which. Tasks are found
before there is a cache: a decoding loop of one's own gives `task_ids` from its second step on, `generate` finds them once. A task
that does not change a layer is the least likely there, by half of the least response of the others.
"""


def write_page(results: list[dict[str, Any]]) -> None:
    """One section per suite, real8 first."""
    results = sorted(results, key=lambda r: r["suite"] != "real8")
    parts = [TEXT.replace("{batch}", str(results[0]["batch"]))]
    (DOCS / "img").mkdir(parents=True, exist_ok=True)
    for result in results:
        parts.append(section(result))
    parts.append((NOTES / "routing.md").read_text())
    (DOCS / "routing.md").write_text("\n".join(parts))


def section(result: dict[str, Any]) -> str:
    lines = [
        f"## {result['suite']}",
        "",
        f"Test images, one shuffled stream. Heads: {result['images_per_task']} training images per task.",
        "",
        "| model | accuracy | routing accuracy | time | x_incl | routing x |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        routing = row.get("routing")
        cells = [
            row["label"],
            f"{100 * row['accuracy']:.2f}",
            "" if routing is None else f"{100 * routing['accuracy']:.1f}",
            time_of(row),
            f"{row['x_incl']:.2f}" if "x_incl" in row else "1.00",
            f"{row['routing_x']:.3f}" if row.get("routing_x") else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for base, tried in result["tried"].items():
        best = max(tried, key=lambda found: found["accuracy"])
        options = {k: v for k, v in best.items() if k != "accuracy"}
        lines += ["", f"SE on {base}, chosen on validation images: `{options}`."]
    name = f"confusion_{result['suite']}.png"
    save_figure(draw(result), DOCS / "img" / name)
    lines += ["", f"![True task against routed task](img/{name})", ""]
    return "\n".join(lines)


def time_of(row: dict[str, Any]) -> str:
    if "time" not in row:
        return "1.00"
    return "" if row["time"] is None else f"{row['time']:.2f}"


def draw(result: dict[str, Any]) -> Figure:
    """Confusion matrices of the routers without training and of the best one."""
    routed = [r for r in result["rows"] if "routing" in r and "DiDi" in r["label"]]
    best = max(routed, key=lambda r: r["routing"]["accuracy"])
    plain = [
        r for r in routed if r["label"].endswith((", representation", ", projection"))
    ]
    shown = [*plain, best]
    with look():
        figure = new_figure(0.6 + 3.7 * len(shown), 4.6)
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, row in zip(panels, shown):
            _confusion(axes, row)
        panels[0].set_ylabel("true task")
        headline(figure, f"{result['suite']}: where images of each task are sent, in %")
        figure.tight_layout()
    return figure


def _confusion(axes, row: dict[str, Any]) -> None:
    routing = row["routing"]
    tasks = routing["tasks"]
    counts = np.array(routing["confusion"], float)[:, : len(tasks)]  # (T, T)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, j in np.argwhere(shares >= 0.05):
        axes.text(
            j,
            i,
            f"{100 * shares[i, j]:.0f}",
            color="white" if shares[i, j] > 0.5 else "black",
            ha="center",
            va="center",
            fontsize=8,
        )
    axes.set_xticks(range(len(tasks)), tasks, rotation=90)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.grid(False)
    axes.tick_params(length=0)
    name = row["label"].removeprefix("DiDi-M, ")
    axes.set_title(f"{name}: {100 * routing['accuracy']:.0f} % right", fontsize=9)
    axes.set_xlabel("sent to")
