"""docs/speed.md from docs/speed.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import AT_BUDGETS, METHODS, PEERS
from benchmarks.suites import NOTES, in_words


def write_page(record: Mapping[str, Any], file: Path) -> None:
    """Tables of what was measured; sections that were not run are left out."""
    lines = ["# Speed and memory of a merge", ""]
    if "peers" in record:
        lines += _peers(record["peers"], PEERS)
    if "budgets" in record:
        lines += _peers(record["budgets"], AT_BUDGETS, options=" budgets")
    if "cold" in record:
        lines += _peers(record["cold"], PEERS, options=" --cold")
    if "growth" in record:
        lines += _growth(record["growth"])
    file.write_text("\n".join(lines) + "\n")


def _peers(
    found: Mapping[str, Any], usual: Sequence[str], *, options: str = ""
) -> list[str]:
    """A table of methods side by side.

    Args:
        usual: methods if none are named.
        options: that the command was run with.
    """
    rows, where = found["rows"], "on disk" if "cold" in options else "in the cache"
    what = "small budgets" if "budgets" in options else "all methods"
    only = ""
    if tuple(rows) != tuple(usual):
        only = " --only " + " ".join(rows)
    peer = rows.get("tsv_m")
    rates = ", ".join(f"{name} {value:.1f}" for name, value in found["rates"].items())
    lines = [
        f"## {found['shape']}, {found['tasks']} tasks, {what}, files {where} to saved model",
        "",
        f"`python -m benchmarks.speed{options} --shape {found['shape']} --tasks {found['tasks']}{only}` on {found['device']}; "
        f"{in_words(found['machine'])}; {rates}.",
        "",
        "| method | runs | seconds | of TSV-M | over floor | peak GB | of TSV-M | relative error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        ratio = row["seconds"] / peer["seconds"] if peer else float("nan")
        memory = row["peak_gb"] / peer["peak_gb"] if peer else float("nan")
        floor = f"{row['seconds'] / row['floor']:.1f}" if "floor" in row else ""
        error = row["relative_error"]
        lines.append(
            f"| {METHODS[name][0]} | {row['runs']} | {row['seconds']:.1f} | {ratio:.2f} | {floor} | "
            f"{row['peak_gb']:.2f} | {memory:.2f} | {'' if error is None else f'{error:.4f}'} |"
        )
    lines += [
        "",
        "Seconds per stage:",
        "",
        "| method | scan | decompose | allocate | refine |",
    ]
    lines.append("|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        if row["stages"]:
            stages = " | ".join(f"{s:.1f}" for s in row["stages"].values())
            lines.append(f"| {METHODS[name][0]} | {stages} |")
    return [*lines, ""]


def _growth(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Growth",
        "",
        f"`python -m benchmarks.speed growth`; {in_words(found['machine'])}.",
        "",
        "| method | shape | tasks | runs | seconds | peak GB |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {METHODS[row['method']][0]} | {row['shape']} | {row['tasks']} | {row['runs']} | {row['seconds']:.1f} | "
            f"{row['peak_gb']:.2f} |"
        )
    lines.append("")
    for method, exponents in found["exponents"].items():
        law = " and ".join(f"{name}^{value:.2f}" for name, value in exponents.items())
        lines.append(f"- {METHODS[method][0]}: time grows as {law}.")
    notes = NOTES / "speed.md"
    return [*lines, "", notes.read_text()]
