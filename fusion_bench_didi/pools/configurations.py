"""What models compute beside their weights: where fine-tuned models say something else than the base model, no merge is theirs."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

#: Settings that no shape of a tensor tells, and that every layer's outputs depend on.
COMPUTED = (
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "num_heads",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
)


def differing(base: PretrainedConfig, tuned: PretrainedConfig | Any) -> list[str]:
    """What two configurations say otherwise of the computation, as ``name: base model's != fine-tuned model's``.

    Args:
        tuned: a configuration, or the content of its file.
    """
    if isinstance(tuned, Mapping):
        try:
            tuned = type(base).from_dict(dict(tuned))
        except Exception:  # of any type: what a class makes of another's file
            return []
    here, there = (dict(_settings(c.to_dict())) for c in (base, tuned))
    return [
        f"{name}: {value!r} != {there[name]!r}"
        for name, value in here.items()
        if name in there and there[name] != value
    ]


def _settings(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in COMPUTED:
            yield within + key, value
        elif key.endswith("_config") and isinstance(value, Mapping):
            yield from _settings(value, f"{within}{key}.")
