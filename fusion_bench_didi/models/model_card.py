"""The README.md beside saved weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from ..report.units import readable
from .overview import is_repository, place_of, told_edit


@dataclass(frozen=True)
class CardFacts:
    """Facts for the model card that only a model's maker can say.

    Args:
        place: by which readers load it: its repository, or the directory that the card lies in.
        license: an identifier of the hub.
        datasets: of the hub, on which the fine-tuned models were trained.
    """

    place: str = "."
    license: str = "unknown"
    datasets: Sequence[str] = ()


def model_card(config: Mapping[str, Any], facts: CardFacts = CardFacts()) -> str:
    """Tasks, budget, storage table and parents of a merged model, in the hub's format; without places of this machine.

    Args:
        config: the saved configuration.
    """
    storage, info, backbone = config["storage"], config["info"], config["backbone"]
    parents, source = info.get("parents", {}), place_of(backbone["source"])
    header = ModelCardData(
        base_model=source if is_repository(source) else None,
        license=facts.license,
        datasets=list(facts.datasets) or None,
        library_name="fusion-bench",
        tags=["model-merging", "didi-merging"],
    )
    error, edits = info.get("relative_error"), info.get("edits") or ()
    edits = [told_edit(edit) for edit in edits]
    lines = [
        "---",
        header.to_yaml(),
        "---",
        "",
        f"# {config['model_class']}: {len(config['tasks'])} tasks on one backbone",
        "",
        f"Made by `{info.get('method', 'fusion_bench_didi')}` with budget {info.get('budget', 'not recorded')}"
        + ("." if error is None else f", relative error {error:.2g}."),
        f"Backbone: `{backbone['class']}` from {_shown(source)} (not contained).",
        "",
        *_usage(config, source, facts.place),
        "",
        *([f"Edited after the merge: {_line(', '.join(edits))}.", ""] if edits else []),
        "| part | size | in fine-tuned models |",
        "|---|---|---|",
    ]
    unit = storage["unit_bits"]
    rows = [("shared", storage["shared_bits"])]
    rows += [(f"expert {task}", bits) for task, bits in storage["expert_bits"].items()]
    rows += [
        ("all beyond the backbone", round(storage["x_excl"] * unit)),
        ("with the backbone", round(storage["x_incl"] * unit)),
    ]
    lines += [
        f"| {_cell(name)} | {readable(bits)} | {bits / unit:.4f} |"
        for name, bits in rows
    ]
    lines += ["", "| task | fine-tuned model |", "|---|---|"]
    lines += [
        f"| {_cell(task)} | {_cell(_shown(parents.get(task)))} |"
        for task in config["tasks"]
    ]
    return "\n".join(lines) + "\n"


def _usage(config: Mapping[str, Any], source: str | None, place: str) -> list[str]:
    """Python that loads the model, and sets its first task."""
    call = f"model = load({json.dumps(place)})"
    if source is None:
        cls = config["backbone"]["class"].rpartition(".")[2]
        call = f"{call[:-1]}, base_model)  # the {cls} that the merge started from"
    return [
        "```python",
        "from fusion_bench_didi import load",
        "",
        call,
        *(f"model.set_task({json.dumps(task)})" for task in config["tasks"][:1]),
        "```",
    ]


def _shown(source: str | None) -> str:
    """A repository by its name, a directory by its last part."""
    if not source:
        return "a model in memory"
    if is_repository(source):
        return f"`{_line(source)}`"
    return f"`{_line(PurePath(source).name)}` in a local directory"


def _line(text: str) -> str:
    """Names may hold anything; one that ends a line, or code, would change the page."""
    return " ".join(text.replace("`", "'").split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
