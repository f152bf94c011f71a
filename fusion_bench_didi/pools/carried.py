"""Settings of configurations that change no state of a network, and that tasks of one merged model may have several of.

Models read them where they are called: in a loss, where they turn labels into what a decoder is given, or not at all. Those that
states and logits depend on are compared in :mod:`.configurations`.
"""

import math
from collections.abc import Mapping
from typing import Any

from .configurations import Configuration, parts, plain

PROBLEM = "problem_type"
REGRESSION, MULTI_LABEL = "regression", "multi_label_classification"
PROBLEMS = (REGRESSION, "single_label_classification", MULTI_LABEL)
#: Read where a loss is worked out, of arguments that are called labels.
OF_LOSSES = frozenset(
    {
        PROBLEM,
        *("ctc_loss_reduction", "ctc_zero_infinity"),
        *("semantic_loss_ignore_index", "loss_ignore_index", "auxiliary_loss_weight"),
        *("class_cost", "bbox_cost", "giou_cost", "eos_coefficient"),
        *("bbox_loss_coefficient", "giou_loss_coefficient"),
        *("mask_loss_coefficient", "dice_loss_coefficient"),
        *("focal_alpha", "focal_loss_alpha", "focal_loss_gamma", "use_focal_loss"),
        *("matcher_class_cost", "matcher_bbox_cost", "matcher_giou_cost"),
        *("matcher_alpha", "matcher_gamma", "weight_loss_vfl", "weight_loss_bbox"),
        *("weight_loss_giou", "weight_loss_fgl", "weight_loss_ddf"),
        *("positive_label_weight", "aggregation_loss_weight"),
        *("answer_loss_importance", "disable_per_token_loss"),
        *("distance_loss_weight", "duration_loss_weight"),
    }
)
#: Read where a decoder's tokens are made of labels, or of the encoder's tokens.
OF_DECODERS = frozenset({"decoder_start_token_id", "eos_token_id", "bos_token_id"})
#: Read there too, in losses over alignments, and by heads that find the last token.
PADDING = "pad_token_id"
#: Read by other programs, and by pipelines.
SAID = frozenset(
    {
        *("task_specific_params", "finetuning_task"),
        *("max_position_embeddings", "n_positions"),
    }
)
CARRIED = OF_LOSSES | OF_DECODERS | SAID | {PADDING}


def carried(config: Configuration | None) -> dict[str, Any]:
    """Such settings of a configuration, by their names; those of parts are named as ``decoder.pad_token_id``."""
    return {
        within + key: value
        for within, part in parts({} if config is None else plain(config))
        for key, value in part.items()
        if key in CARRIED and fits(key, value)
    }


def fits(name: str, value: Any) -> bool:
    """Whether a value may be one of such a setting."""
    key = name.rpartition(".")[2]
    if key == PROBLEM:
        return value is None or value in PROBLEMS
    if key in OF_DECODERS or key == PADDING:
        tokens = value if key == "eos_token_id" and isinstance(value, list) else [value]
        return value is None or all(type(token) is int for token in tokens)
    if key == "task_specific_params":
        return value is None or (isinstance(value, Mapping) and _is_json(value))
    if key in ("max_position_embeddings", "n_positions"):
        return type(value) is int and value > 0
    if key == "finetuning_task":
        return value is None or isinstance(value, str)
    if key == "ctc_loss_reduction":
        return value in ("sum", "mean")
    return type(value) in (bool, int, float) and math.isfinite(value)


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) for k in value) and all(map(_is_json, value.values()))  # fmt: skip
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, float, str))
