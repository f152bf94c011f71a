"""What a comparison's pictures show, in words for their titles: computed from the rows, behind the suite's name."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from .comparison import Comparison, kind
from .modules import Place, energy_lines

#: retention from which on a method keeps what the fine-tuned models can
KEPT = 0.99
#: parts of a place that name nothing
_NAMELESS = ("_pretrained_", "models", "vision", "base", "suite")


def suite_of(comparison: Comparison) -> str:
    """Name of the suite: its folder, or the base model; empty if nothing tells."""
    pool = comparison.config.get("modelpool") or {}
    if "Demo" in str(pool.get("_target_")):
        return "embedded demo"
    base = (pool.get("models") or {}).get("_pretrained_")
    if isinstance(base, Mapping):
        base = base.get("pretrained_model_name_or_path")
    parts = PurePath(str(pool.get("root") or base or "")).parts
    return next((part for part in reversed(parts) if part not in _NAMELESS), "")


def of_storage(comparison: Comparison) -> str:
    """Where ours keeps 99 %."""
    least = smallest(comparison)
    if least is None:
        return _of(comparison, comparison.worded("accuracy against storage"))
    share = 100 * least["retention"]["mean_of_ratios"]
    return _of(
        comparison,
        f"{least['family']} keeps {share:.1f} % of {len(comparison.tasks)} fine-tuned models in the space of "
        f"{least['x_excl']:.2f} models",
    )


def of_tasks(comparison: Comparison) -> str:
    """The task that ours is furthest from the task's own model on."""
    ours, own = smallest(comparison), own_models(comparison)
    if ours is None or own is None:
        return _of(comparison, comparison.worded("accuracy by task, in %"))
    lost = {t: 100 * (own["accuracy"][t] - ours["accuracy"][t]) for t in comparison.tasks}  # fmt: skip
    worst = max(lost, key=lost.get)
    if lost[worst] < 0.05:
        told = "is nowhere below the task's own model"
    else:
        told = f"loses at most {lost[worst]:.1f} points to the task's own model, on {worst}"
    return _of(comparison, f"{ours['method']} {told}")


def of_ranks(comparison: Comparison) -> str:
    """Which matrices of the layers get least rank, in the row that is shown in detail."""
    row = comparison.shown_in_detail()
    found: dict[Place, list[int]] = {}
    for ranks in row["ranks"]["experts"].values():
        for name, rank in ranks.items():
            if (place := Place.of(name)).layer is not None:
                found.setdefault(place, []).append(rank)
    if not found:
        return _of(comparison, f"ranks of {row['method']}")
    means = {place: np.mean(ranks) for place, ranks in found.items()}
    least = min(means, key=means.get)
    return _of(
        comparison,
        f"{row['method']} gives {least.short} of layer {least.layer} the least rank, {means[least]:.0f} on average of up to "
        f"{max(map(max, found.values()))}",
    )


def of_energy(comparison: Comparison) -> str:
    """Where least energy is kept, in the row that is shown in detail."""
    row = comparison.shown_in_detail()
    kept = [
        (mean, line.kind, layer)
        for line in energy_lines(row["energy_kept"])
        for layer, mean in zip(line.layers, line.mean)
    ]
    if not kept:
        return _of(comparison, f"energy that {row['method']} keeps")
    least, where, layer = min(kept)
    return _of(
        comparison,
        f"{row['method']} keeps {100 * least:.1f} % or more of the task vectors' energy, least in {where} of layer {layer}",
    )


#: by the names of the pictures
OF = {
    "accuracy_vs_storage": of_storage,
    "accuracy_by_task": of_tasks,
    "ranks": of_ranks,
    "energy_kept": of_energy,
}


def smallest(comparison: Comparison) -> Mapping[str, Any] | None:
    """The smallest of ours that keeps what the fine-tuned models can."""
    kept = [
        r
        for r in comparison.good
        if kind(r) == "ours" and (r["retention"]["mean_of_ratios"] or 0) >= KEPT
    ]
    return min(kept, key=lambda r: r["x_excl"], default=None)


def own_models(comparison: Comparison) -> Mapping[str, Any] | None:
    """The row of the fine-tuned models themselves."""
    rows = comparison.good
    return next((r for r in rows if (r["routing"], r["group"]) == ("oracle", "reference")), None)  # fmt: skip


def _of(comparison: Comparison, told: str) -> str:
    suite = suite_of(comparison)
    return f"{suite}: {told}" if suite else f"{told[0].upper()}{told[1:]}"
