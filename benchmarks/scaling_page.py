"""docs/scaling.md from docs/scaling.json."""

import math
from typing import Any

from benchmarks.suites import in_words


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """Of the growth from the first to the last row."""
    first, last = rows[0], rows[-1]
    return math.log(last[key] / first[key]) / math.log(last["tasks"] / first["tasks"])


def page(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Growth over processes and tasks",
        "",
        f"`python -m benchmarks.scaling`; {in_words(found['machine'])}. Seconds of the processor; on a machine whose host does other",
        "work they repeat within some tens of per cent.",
    ]
    if rows := found.get("processes"):
        lines += _processes(rows)
    if groups := found.get("tasks"):
        lines += [
            "",
            "## Tasks",
            "",
            "A model of four small matrices and vectors, and LoRA adapters of rank 8 of a language model of width 128: merged into "
            "files,",
            "and these loaded (the least of three). *Exponent*: of the seconds in the number of tasks, from the first row to the last.",
            "",
            "| what | tasks | merge s | load s | merge resident GB |",
            "|---|--:|--:|--:|--:|",
        ]
        for what, rows in groups.items():
            for row in rows:
                lines.append(
                    f"| {what} | {row['tasks']} | {row['merge cpu']:.2f} | {row['load cpu']:.2f} | {row['merge resident'] / 1e9:.2f} |"
                )
            found_exponents = [exponent(rows, f"{w} cpu") for w in ("merge", "load")]
            lines.append(
                f"| {what}, exponent | | {found_exponents[0]:.2f} | {found_exponents[1]:.2f} | |"
            )
    return lines


def _processes(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Processes",
        "",
        "One thread each, files in the system's cache to a written model; two cores, so that four processes show how work is",
        "spread and what it needs, not how long one waits. *Speed-up*: the seconds of one process over those of the slowest of",
        "several. Memory: the most at any time. *Own* is what the merge adds to the interpreter and its libraries",
        "(0.6 GB here, whatever is merged): the memory that one more process takes of the machine. *Mapped* are pages of the",
        "checkpoints and of the base model, which is mapped as well: they are there once for all processes, and the system drops",
        "them where it needs the room. *Resident* is what the system's tools show, which count libraries and mapped pages too.",
        "",
        "| model | tasks | budget | processes | seconds of each | speed-up | own GB of each | of one | mapped GB | resident GB | same bytes |",
        "|---|--:|--:|--:|---|--:|---|--:|--:|--:|---|",
    ]
    for row in rows:
        one = next(
            r
            for r in rows
            if r["processes"] == 1
            and all(r[key] == row[key] for key in ("shape", "tasks", "budget"))
        )
        own = ", ".join(f"{size / 1e9:.2f}" for size in row["own"])
        lines.append(
            f"| {row['shape']} | {row['tasks']} | {row['budget']} | {row['processes']} | "
            f"{', '.join(f'{s:.1f}' for s in row['cpu'])} | {one['cpu'][0] / max(row['cpu']):.2f} | "
            f"{own} | {max(row['own']) / one['own'][0]:.2f} | {max(row['files']) / 1e9:.2f} | "
            f"{max(row['resident']) / 1e9:.2f} | {'yes' if row['same bytes'] else 'no'} |"
        )
    return lines
