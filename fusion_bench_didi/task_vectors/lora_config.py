"""What ``adapter_config.json`` tells of a LoRA adapter: rank and scale per module, and whether it is a plain one."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointMismatchError

CONFIG = "adapter_config.json"

#: Variants of LoRA whose change of a weight is not ``scale * B A``, by the setting that turns them on.
VARIANTS = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)

#: Starts that leave the base model's weights alone; others (PiSSA, OLoRA, ...) take part of them into the adapter.
STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoraSettings:
    """The arithmetic of a plain LoRA adapter: ``W + scale * B A``.

    Args:
        rank, alpha: of a module that no pattern names.
        root: scale is ``alpha / sqrt(rank)`` (rank-stabilised LoRA) and not ``alpha / rank``.
        ranks, alphas: by pattern, a regular expression for the end of a module's name; the first that matches counts.
        fan_in_first: weights are (in, out), as in GPT-2, where their shape does not tell.
    """

    rank: int
    alpha: float
    root: bool = False
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None
    fan_in_first: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LoraSettings":
        return cls(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            root=bool(config.get("use_rslora")),
            ranks=config.get("rank_pattern"),
            alphas=config.get("alpha_pattern"),
            fan_in_first=bool(config.get("fan_in_fan_out")),
        )

    def rank_of(self, module: str) -> int:
        return _matched(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _matched(self.alphas, module, self.alpha) / (
            math.sqrt(rank) if self.root else rank
        )


def read_config(directory: Path, label: str) -> dict[str, Any]:
    """The configuration of an adapter.

    Raises:
        CheckpointMismatchError: if the file cannot be read.
    """
    file = directory / CONFIG
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointMismatchError(
            f"{label}: {file} is not the configuration of an adapter ({error}). Download or write it again."
        ) from error


def variants(config: Mapping[str, Any]) -> list[str]:
    """What makes an adapter another one than plain LoRA: what was found, and what is expected."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"{CONFIG} has peft_type={kind!r}, expected 'LORA'"]
    found = [
        f"{CONFIG} has {name}={config[name]!r}, expected none of it (plain LoRA)"
        for name in VARIANTS
        if config.get(name)
    ]
    start = config.get("init_lora_weights", True)
    if str(start).lower() not in STARTS:
        found.append(
            f"{CONFIG} has init_lora_weights={start!r}, expected one that leaves the base model as it is "
            f"({', '.join(STARTS)})"
        )
    return found


def _matched(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
