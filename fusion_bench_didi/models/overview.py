"""A merged model on one screen: tasks, budget, storage by part, bits and ranks, errors and parents.

Made of the saved configuration, or of what a live model would save, so that ``repr(model)`` and ``didi inspect`` are one.
"""

import os
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any

from ..pools.entries import PLACE
from ..report.units import readable, storage_line
from ..task_vectors.places import is_name

#: So many tasks have a line each.
MOST_TASKS = 12
_WIDTH = 100


def overview(config: Mapping[str, Any]) -> str:
    """The overview of a model as a screen of text.

    Args:
        config: as saved.
    """
    lines = [_cut(title_of(config))]
    lines += [
        textwrap.fill(f"{what:<9}{value}", _WIDTH, subsequent_indent=" " * 9)
        for what, value in facts_of(config).items()
    ]
    heads, rows = tasks_of(config)
    if rows:
        table = [heads, *rows[:MOST_TASKS]]
        widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
        lines += ["", *(_aligned(row, widths) for row in table)]
        if len(rows) > MOST_TASKS:
            lines.append(f"… and {len(rows) - MOST_TASKS} more")
    return "\n".join(lines)


def as_html(config: Mapping[str, Any]) -> str:
    """The overview as HTML, for notebooks."""
    facts = (
        f"<tr><th style='text-align:left'>{escape(what)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
        for what, value in facts_of(config).items()
    )
    heads, rows = tasks_of(config)
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return (
        f"<div><strong>{escape(title_of(config))}</strong><table>{''.join(facts)}</table>"
        f"<details><summary>{len(rows)} tasks</summary><table><tr>{head}</tr>{body}</table></details></div>"
    )


def title_of(config: Mapping[str, Any]) -> str:
    """Title of the overview, in a line."""
    kind = config.get("model_class") or config.get("kind", "model")
    method = config.get("info", {}).get("method")
    by = f" by {method}" if method else ""
    backbone = config["backbone"]
    cls = backbone["class"].rpartition(".")[2]
    place = shortened(place_of(backbone.get("source"))) or "memory"
    return f"{kind}{by}: {len(names_of(config))} tasks on {cls} from {place}"


def names_of(config: Mapping[str, Any]) -> list[str]:
    """Names of the tasks."""
    if "tasks" in config:
        return list(config["tasks"])
    return [one["task"] for one in config.get("experts", [])]


def facts_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Facts about the whole model, a line each."""
    info, storage = config.get("info", {}), config.get("storage")
    facts = {}
    if (budget := info.get("budget")) is not None:
        counted = info.get("settings", {}).get("budget", {})
        within = isinstance(counted, Mapping) and counted.get("include_backbone")
        where = ", the backbone counted" if within else " beyond the backbone"
        facts["budget"] = f"{float(budget):g}{where}"
        if info.get("edits") and info["edits"][-1]["operation"] != "rescale":
            facts["budget"] += ", before it was edited"
    if storage:
        facts["storage"] = storage_line(storage)
        facts["parts"] = _parts(storage)
    for what, key, of in (
        ("numbers", "precision", "tensors"),
        ("forms", "forms", "matrices"),
    ):
        if info.get(key):
            counts = Counter(info[key].values()).most_common()
            told = ", ".join(f"{name} in {count}" for name, count in counts)
            facts[what] = f"{told} {of}"
    if ranks := info.get("ranks"):
        own = [k for of_task in ranks["experts"].values() for k in of_task.values()]
        shared = list(ranks["shared"].values())
        facts["ranks"] = f"shared {_spread(shared)}; experts {_spread(own)}"
    if (error := info.get("relative_error")) is not None:
        facts["error"] = f"{error:.2g} of the task vectors' energy is not reproduced"
        if any(told.get("excluded") for told in info.get("tensors", {}).values()):
            facts["error"] += ", excluded tensors not counted"
    if edits := info.get("edits"):
        facts["edited"] = ", ".join(map(told_edit, edits))
    if router := config.get("router"):
        facts["router"] = router["kind"]
    if version := config.get("versions", {}).get("fusion-bench-didi"):
        facts["written"] = f"by fusion_bench_didi {version}"
    return facts


def told_edit(edit: Mapping[str, Any]) -> str:
    """An edit after the merge: what was done, with which task if with one."""
    return f"{edit['operation']} {edit.get('task', '')}".strip()


def tasks_of(config: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row per task."""
    info, storage = config.get("info", {}), config.get("storage") or {}
    columns = {
        "own": (storage.get("expert_bits"), readable, "–"),
        "error": (info.get("relative_errors"), "{:.2g}".format, "–"),
        "fine-tuned model": (info.get("parents"), shortened, "a model in memory"),
    }
    columns = {head: column for head, column in columns.items() if column[0]}
    rows = [[task] for task in names_of(config)]
    for known, shown, otherwise in columns.values():
        for row in rows:
            cell = shown(known[row[0]]) if row[0] in known else None
            row.append(cell or otherwise)
    return ["task", *columns], rows


def place_of(source: Any) -> str | None:
    """Where a base model lies, of what a pool's entry may be."""
    if isinstance(source, Mapping):
        source = source.get(PLACE)
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else None


def shortened(place: str | None) -> str | None:
    """A directory by its last two parts."""
    parts = PurePath(place or "").parts
    return place if len(parts) < 3 else f"…/{'/'.join(parts[-2:])}"


def is_repository(source: str | None) -> bool:
    """Whether a place is a name on the hub."""
    return bool(source) and is_name(source, owned=False) and not Path(source).exists()


def _parts(storage: Mapping[str, Any]) -> str:
    own = list(storage["expert_bits"].values())
    sizes = dict.fromkeys(map(readable, (min(own), max(own)) if own else ()))
    each = " to ".join(sizes) or "nothing"
    told = f"shared {readable(storage['shared_bits'])}, experts {each} each"
    if storage.get("routing_bits"):
        told += f", router {readable(storage['routing_bits'])}"
    return told


def _spread(ranks: Sequence[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    if low == high:
        return str(low or "none")
    return f"{low} to {high} (median {statistics.median(ranks):g})"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    return _cut("  ".join(cell.ljust(width) for cell, width in zip(row, widths)))


def _cut(text: str) -> str:
    text = " ".join(text.splitlines()).rstrip()
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
