"""docs/slim_serving.md, from the results of ``python -m benchmarks.slim_serving``."""

from pathlib import Path
from typing import Any

from benchmarks.suites import NOTES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "slim_serving.md"
#: Aims: memory beyond backbone and stored, time of plain in a forward, tokens per second of plain.
MEMORY, TIME, TOKENS = 1.1, 1.3, 0.3
TEXT = """# Serving in little memory

`Serving(memory_limit_gb=G)` on `model.serving` keeps a mixed batch to the backbone, what is stored, and G GB of decoded tensors
of tasks that are asked for often. `python -m benchmarks.slim_serving` measures it: a batch of 64 samples of eight tasks (images, or
prompts of 16 tokens), and text of eight prompts of eight tasks, token by token. Aims: at most backbone + stored + 10 % in memory, at
most 1.3 times the plain forward, at least 0.3 of the plain model's tokens per second.

*Alive* are all tensors after a batch, in backbones; *of backbone + stored* is what is aimed at. *Peak* is what a batch takes
meanwhile above that (activations too, as of the plain model in the first row), *first batch* the same for the first one, in which
layers are checked against the plain model of single tasks.
The last row is the backbone as the model of one task, base weights kept beside it. Weights are made on the spot (`benchmarks/checkpoints.py`): real shapes and spectra, no trained models.
"""
MIB = 2**20


def write_page(record: dict[str, Any]) -> None:
    parts = [TEXT.rstrip()]
    for key, found in record.items():
        parts += section(key, found)
    parts += ["", (NOTES / "slim_serving.md").read_text().rstrip()]
    PAGE.write_text("\n".join(parts) + "\n")


def section(key: str, found: dict[str, Any]) -> list[str]:
    held, rows = found["backbone"] + found["stored"], found["rows"]
    where = (
        found["on"]
        or f"{found['machine']['threads']} thread{'s' * (found['machine']['threads'] > 1)}"
    )
    lines = [
        "",
        f"## {key}",
        "",
        f"Backbone {found['backbone'] / MIB:.0f} MiB ({found['dtype'].removeprefix('torch.')}), stored "
        f"{found['stored'] / MIB:.0f} MiB; {where}, torch {found['machine']['torch']}.",
        "",
        "| way | alive | of backbone + stored | peak, MiB | first batch, MiB | ms | of plain | tokens/s of plain |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        slim = name == "mixed, nothing held"
        share, tokens = row["alive"] / held, row.get("tokens_of_plain")
        cells = [
            f"{row['alive'] / found['backbone']:.2f}",
            _told(share, share <= MEMORY or not slim),
            f"{row['peak'] / MIB:.0f}",
            f"{row['first_peak'] / MIB:.0f}" if "first_peak" in row else "",
            f"{1e3 * row['seconds']:.0f}",
            (
                _told(row["ratio"], not slim or row["ratio"] <= TIME)
                if "ratio" in row
                else ""
            ),
            "" if tokens is None else _told(tokens, not slim or tokens >= TOKENS),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _told(value: float, met: bool) -> str:
    return f"{value:.2f}" if met else f"**{value:.2f}, missed**"
