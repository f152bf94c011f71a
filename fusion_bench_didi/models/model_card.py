"""The README.md beside saved weights."""

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
    parents = info.get("parents", {})
    header = ModelCardData(
        base_model=backbone["source"] if _is_repository(backbone["source"]) else None,
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
        f"Backbone: `{backbone['class']}` from `{backbone['source'] or 'memory'}` (not contained).",
        "",
        "```python",
        f"from {home} import {config['model_class']}",
        "",
        f'model = {config["model_class"]}.from_pretrained("<this directory>", backbone=...)',
        f'model.set_task("{config["tasks"][0]}")',
        "```",
        "",
        "| part | MB | in fine-tuned models |",
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
        f"| {name} | {bits / 8e6:.2f} | {bits / unit:.4f} |" for name, bits in rows
    ]
    lines += ["", "| task | fine-tuned model |", "|---|---|"]
    lines += [
        f"| {task} | {parents.get(task) or 'a model in memory'} |"
        for task in config["tasks"]
    ]
    return "\n".join(lines) + "\n"


def _is_repository(source: Any) -> bool:
    """Whether a source is a name on the hub, which is all that the card's header may name."""
    return (
        isinstance(source, str) and source.count("/") == 1 and not Path(source).exists()
    )
