"""docs/serving.md, from the results of ``python -m benchmarks.serving``."""

from pathlib import Path
from typing import Any

from benchmarks.suites import NOTES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "serving.md"
#: largest ratio to the plain model that is aimed at
TARGETS = {"one task": 1.0, "mixed": 1.3, "routed": 1.5}
#: what of a ratio of 1.00 is noise
NOISE = 0.03
TEXT = """# Benchmark: a batch of several tasks beside the plain model

`python -m benchmarks.serving` merges DiDi-M (1.40, eight tasks) and times a batch of 64 images: under one task that is set,
with a task per image ("mixed"), and with tasks found by the projection router ("routed"). All ratios are to the plain model
on the same batch in the same data type. Calls are taken in turns, figures are medians (of processor time on a CPU, since
other work ran on the machine). Tasks are drawn at random, so that their numbers of images differ; random pixels all look
like one task to a router, so its weights are replaced by the same tasks after it has run. All of it takes seven minutes of
one processor, merges among them; checkpoints of a shape are made once.
"""


def write_page(record: dict[str, Any]) -> None:
    """A table of what is aimed at, then one section per towers, device, data type and kind of factors."""
    parts = [TEXT, *summary(record)]
    for key, found in record.items():
        parts += section(key, found)
    parts += ["", (NOTES / "serving.md").read_text().rstrip()]
    PAGE.write_text("\n".join(parts) + "\n")


def summary(record: dict[str, Any]) -> list[str]:
    aims = [f"{name} (at most {aim:.2f})" for name, aim in TARGETS.items()]
    lines = [
        f"| towers | {' | '.join(aims)} | mixed, compiled | mixed over plain, both compiled |",
        "|---|" + "--:|" * (len(TARGETS) + 2),
    ]
    for key, found in record.items():
        rows = found["rows"]
        cells = [verdict(rows[name]["ratio"], aim) for name, aim in TARGETS.items()]
        if "mixed, compiled" in rows:
            fast, faster = rows["mixed, compiled"], rows["plain, compiled"]
            cells += [f"{fast['ratio']:.2f}", f"{fast['ratio'] / faster['ratio']:.2f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines


def verdict(ratio: float, aim: float) -> str:
    met = ratio <= (aim + NOISE if aim == 1 else aim)
    return f"{ratio:.2f}" if met else f"**{ratio:.2f}, missed**"


def section(key: str, found: dict[str, Any]) -> list[str]:
    setup = found["machine"]
    native = " with bfloat16 products of its own" if found["native_bfloat16"] else ""
    lines = [
        "",
        f"## {key}",
        "",
        f"Stored {found['x_excl']:.2f}; {setup['threads']} thread{'s' * (setup['threads'] > 1)}, torch {setup['torch']}, "
        f"a processor{native}; "
        f"{found['minutes']:.1f} minutes, peak {found['peak_gb']:.1f} GB.",
        "",
        "| forward | ms | of plain | over floor | held beside the files |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in found["rows"].items():
        copies = f"{row['held']:.1f} models" if "held" in row else ""
        lines.append(
            f"| {name} | {1e3 * row['seconds']:.1f} | {row['ratio']:.2f} | {row['over floor']:.2f} | {copies} |"
        )
    switching = [
        f"{name} {1e3 * row['seconds']:.0f} ms ({row['ratio']:.1f})"
        for name, row in found["switching"].items()
    ]
    return [*lines, "", f"Switching, and its ratio to a copy: {', '.join(switching)}."]
