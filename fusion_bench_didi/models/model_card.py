"""The README.md beside saved weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData


def model_card(
    config: Mapping[str, Any], home: str = "fusion_bench_didi.models"
) -> str:
    """Tasks, budget, storage table and parents of a merged model, in the hub's format.

    Args:
        config: the saved configuration.
        home: where its class is imported from.
    """
    storage, info, backbone = config["storage"], config["info"], config["backbone"]
    parents, source = info.get("parents", {}), _place(backbone["source"])
    header = ModelCardData(
        base_model=source if _is_repository(source) else None,
        library_name="fusion-bench",
        tags=["model-merging", "didi-merging"],
    )
    lines = [
        "---",
        header.to_yaml(),
        "---",
        "",
        f"# {config['model_class']}: {len(config['tasks'])} tasks on one backbone",
        "",
        f"Made by `{info.get('method', 'fusion_bench_didi')}` with budget {info.get('budget', 'not recorded')}.",
        f"Backbone: `{backbone['class']}` from `{_line(source or 'memory')}` (not contained).",
        "",
        "```python",
        f"from {home} import {config['model_class']}",
        "",
        f'model = {config["model_class"]}.from_pretrained("<this directory>", backbone=...)',
        *(f"model.set_task({json.dumps(task)})" for task in config["tasks"][:1]),
        "```",
        "",
        "| part | MB | in fine-tuned models |",
        "|---|---|---|",
    ]
    if edits := info.get("edits"):
        done = (f"{e['operation']} {e.get('task', '')}".strip() for e in edits)
        lines.insert(-2, f"Edited after the merge: {_line(', '.join(done))}.\n")
    unit = storage["unit_bits"]
    rows = [("shared", storage["shared_bits"])]
    rows += [(f"expert {task}", bits) for task, bits in storage["expert_bits"].items()]
    rows += [
        ("all beyond the backbone", round(storage["x_excl"] * unit)),
        ("with the backbone", round(storage["x_incl"] * unit)),
    ]
    lines += [
        f"| {_cell(name)} | {bits / 8e6:.2f} | {bits / unit:.4f} |"
        for name, bits in rows
    ]
    lines += ["", "| task | fine-tuned model |", "|---|---|"]
    lines += [
        f"| {_cell(task)} | {_cell(parents.get(task) or 'a model in memory')} |"
        for task in config["tasks"]
    ]
    return "\n".join(lines) + "\n"


def _place(source: Any) -> str | None:
    """Where the base model lies, of what a pool's entry may be."""
    if isinstance(source, Mapping):
        source = source.get("pretrained_model_name_or_path")
    return source if isinstance(source, str) else None


def _line(text: str) -> str:
    """Names may hold anything; one that ends a line, or code, would change the page."""
    return " ".join(text.replace("`", "'").split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _is_repository(source: str | None) -> bool:
    """Whether a source is a name on the hub, which is all that the card's header may name."""
    return bool(source) and source.count("/") == 1 and not Path(source).exists()
