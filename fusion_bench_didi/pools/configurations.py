"""What models compute beside their weights: where a fine-tuned model says something else than the base model, no merge is its."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from ..errors import CheckpointMismatchError

log = logging.getLogger(__name__)

#: Settings that no shape of a tensor tells, and that outputs depend on, as ``python -m benchmarks.computed_settings`` finds them
#: in every architecture of transformers. Others (dropout, versions, types, caches) do not matter to a merge.
COMPUTED = frozenset(
    {
        # how states are cut into heads and groups
        *("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"),
        *("encoder_attention_heads", "decoder_attention_heads", "attention_heads"),
        *("n_heads", "num_groups", "block_repeats"),
        # where positions enter
        *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"),
        *("rotary_emb_base", "rotary_pct", "rotary_dim", "partial_rotary_factor"),
        *("position_embedding_type", "relative_attention_max_distance", "alibi"),
        *("global_rope_theta", "local_rope_theta", "rope_interleave", "rotary_value"),
        *("relative_attention", "pos_att_type", "position_buckets", "norm_rel_ebd"),
        *("max_relative_position", "pretrained_window_sizes", "alibi_bias_max"),
        # what is attended to
        *("sliding_window", "layer_types", "window_size", "is_decoder"),
        *("attention_chunk_size", "no_rope_layers", "attention_window", "causal"),
        *("local_attention", "global_attn_every_n_layers", "local_radius"),
        *("local_attn_chunk_length", "lsh_attn_chunk_length", "hash_code_len"),
        *("attention_layers", "attention_types", "use_bidirectional_attention"),
        *("keep_window_size", "local_transformer_stride", "truncation"),
        # functions of single values
        *("hidden_act", "hidden_activation", "activation_function", "dense_act_fn"),
        *("feed_forward_proj", "is_gated_act", "projector_hidden_act", "activation"),
        *("afn", "ff_activation", "gelu_activation", "feat_extract_activation"),
        *("encoder_hidden_act", "decoder_hidden_act", "attention_activation"),
        *("summary_activation", "feature_layer_norm_eps", "assign_eps"),
        *("stem_act_func", "classifier_activation", "pooler_hidden_act", "pooler_act"),
        *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps"),
        *("norm_epsilon", "batch_norm_eps", "mixer_rms_eps", "adapter_layer_norm_eps"),
        *("quant_mode", "token_dropout"),
        # scales and bounds
        *("scale_embedding", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        *("embedding_multiplier", "residual_multiplier", "attention_multiplier"),
        *("logits_scaling", "logit_scale", "query_pre_attn_scalar", "clip_qkv"),
        *("final_logit_softcapping", "attn_logit_softcapping", "scale_depth"),
        *("scale_emb", "dim_model_base", "rescale_embeddings", "logits_soft_cap"),
        *("attention_in_multiplier", "attention_out_multiplier", "key_multiplier"),
        *("mlp_multipliers", "lm_head_multiplier", "ssm_multipliers"),
        *("ssm_in_multiplier", "ssm_out_multiplier", "time_step_limit"),
        *("full_attn_alpha_factor", "full_attn_beta_factor", "mlp_alpha_factor"),
        *("linear_attn_alpha_factor", "linear_attn_beta_factor", "mlp_beta_factor"),
        *("softmax_scale", "use_qk_norm", "scale_input", "scaling", "img_range"),
        # what is connected how
        *("do_layer_norm_before", "normalize_before", "use_parallel_residual"),
        *("parallel_attn", "downsample_in_first_stage", "layer_type"),
        *("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor"),
        *("topk_group", "n_group", "moe_k", "moe_topk", "expert_capacity"),
        *("apply_residual_connection_post_layernorm", "use_post_layernorm"),
        *("do_stable_layer_norm", "positional_embedding_temperature"),
        *("pre_norm", "normalize_before_mega", "normalize_before_ffn"),
        *("adapter_reuse_layer_norm", "ln_before_adapter"),
        *("vision_feature_layer", "vision_feature_select_strategy"),
        # how pictures and sounds are cut, and states are made one
        *("strides", "conv_stride", "patch_stride", "stem_stride", "down_stride"),
        *("output_stride", "down_pad", "padding", "embedding_dynamic_padding"),
        *("downsample_in_bottleneck", "num_query_pool", "classifier_pooling"),
        *("pooling_type", "pool_q_only", "separate_cls", "truncate_seq"),
        *("summary_type", "audio_token_index", "max_image_length"),
        *("adapter_stride", "use_causal_conv", "lags_sequence", "head_in_index"),
        # what single families have: depths, voices, sparse attention, layers that share
        *("max_depth", "min_depth", "depth_estimation_type", "bin_configurations"),
        *("speaking_rate", "noise_scale", "noise_scale_duration", "leaky_relu_slope"),
        *("wavenet_dilation_rate", "duration_predictor_tail_bound"),
        *("attention_window_size", "global_block_size", "encoder_attention_type"),
        *("fullatt_block_indexes", "num_landmarks", "block_size"),
        *("attn_temperature_tuning", "floor_scale", "attn_scale", "hidden_mamba_act"),
        *("num_kv_shared_layers", "altup_active_idx", "altup_correct_scale"),
        *("activation_sparsity_pattern", "topk_method", "moe_top_k", "num_hashes"),
        *("normalize_modulator", "use_post_layernorm_in_modulation", "approx_mode"),
        *("conf_reduction_factor", "cell_selection_preference"),
        *("use_expectation", "num_hash", "block_per_row", "stagger_local_blocks"),
    }
)
#: Settings of many families that outputs of some depend on.
_BY_FAMILY = {
    # where a head scales its input that is tied to the embedding
    "tie_word_embeddings": {"t5", "mt5", "umt5", "longt5", "switch_transformers"},
    # where layers are one, run so many times
    "num_hidden_layers": {"albert"},
    # where texts are pooled at the token that ends them
    "eos_token_id": {
        *("clip_text_model", "clipseg_text_model", "groupvit_text_model"),
        *("metaclip_2_text_model", "aimv2_text_model"),
    },
    # where it tells the question from the text
    "sep_token_id": {"longformer"},
    # where logits are divided by it
    "temperature": {"tapas"},
}
#: The number that stands for the largest token as the end of a text.
_LARGEST_TOKEN = 2
#: Settings of any model that say how it is trained, written, kept, used or asked, which includes what ``generate`` reads.
_ANYONES = frozenset(
    {
        *PretrainedConfig().to_dict(),
        *GenerationConfig().to_dict(),
        # of transformers before 5
        *("finetuning_task", "task_specific_params", "pruned_heads", "torchscript"),
        *("prefix", "use_bfloat16", "add_cross_attention"),
        *_BY_FAMILY,
    }
)
#: The same of single families, by parts of names; sizes of tables among them, which shapes of tensors tell.
_UNRELATED = re.compile(
    r"^_|drop|init|loss|coef|_cost|focal_|matcher_|label|_token_id|version|cache|dtype|^mask_(time|feature)_|grad|freeze|^ctc_|"
    r"token(izer|_ids)|jitter|vocab|max_(length|position|seq)|n_(positions|ctx)|auto_map|quantization|attn_implementation|pretrain|momentum|unsloth"
)
#: Families that count positions from the token that pads.
_POSITIONS_BY_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer"),
    *("m2m_100", "markuplm", "mpnet", "nllb-moe", "roberta", "roberta-prelayernorm"),
    *("prophetnet", "xlm-prophetnet", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
#: How heads of whole texts are called, some of which find the last token by what pads.
_OF_TEXTS = "ForSequenceClassification"
#: Kinds of positions that depend on the longest text of pre-training.
_BY_LENGTH = {"dynamic", "yarn", "longrope"}

#: A configuration, or the content of its file.
Configuration = PretrainedConfig | Mapping[str, Any]


def check_configurations(base: Any, tuned: Mapping[str, Any]) -> None:
    """The base model runs all tasks: under its configuration they must compute what they did.

    What differs and is known neither to matter nor not to is said.

    Args:
        tuned: by task; what is no configuration says nothing.

    Raises:
        CheckpointMismatchError: listing all differences of all tasks.
    """
    known = (Mapping, PretrainedConfig)
    if not isinstance(base, known):
        return
    faults, told = [], {t: c for t, c in tuned.items() if isinstance(c, known)}
    for task, config in told.items():
        kind, other = (plain(c).get("model_type") for c in (base, config))
        if kind and other and not _of_kind(plain(config), kind):
            log.warning("%s is a %s, run as a %s as the base model is.", task, other, kind)  # fmt: skip
        faults += [f"{task}: {found}" for found in differing(base, config)]
        if unclear := differing(base, config, unclear=True):
            log.warning(
                "%s runs under the base model's configuration, which says otherwise (base model's != fine-tuned model's): %s. "
                "Outputs may depend on it.",
                task,
                "; ".join(unclear),
            )
    if faults:
        raise CheckpointMismatchError(
            "Fine-tuned models compute something else with their weights than the base model, under which all tasks run (base "
            "model's != fine-tuned model's):\n  "
            + "\n  ".join(faults)
            + "\nTake these models out of the pool, or give one that may run as the base model does its value: beside its place in "
            "modelpool.models, in its config.json, or in the module's config."
        )


def differing(
    base: Configuration, tuned: Configuration, *, unclear: bool = False
) -> list[str]:
    """Differences of two configurations in the computation, as ``name: base model's != fine-tuned model's``.

    What one of them leaves out is not compared; models in models of one kind are found in one another.

    Args:
        unclear: differences of which it is not known whether outputs depend on them, in place of those where they do.
    """
    if isinstance(base, PretrainedConfig) and isinstance(tuned, Mapping):
        tuned = as_class(type(base), tuned)
    here, there = (
        {name: value for name, value, known in _settings(plain(c)) if known != unclear}
        for c in (base, tuned)
    )
    return unequal(here, there, lambda one, other: _listed(one) == _listed(other))


def unequal(
    here: Mapping[str, Any],
    there: Mapping[str, Any],
    same: Callable[[Any, Any], bool],
) -> list[str]:
    """Settings of two models that are not the same, as ``name: one's != other's``; what one of them leaves out is not compared."""
    return [
        f"{name}: {value!r} != {there[name]!r}"
        for name, value in here.items()
        if name in there and not same(value, there[name])
    ]


def is_unrelated(key: str) -> bool:
    """Whether a setting of that name says how a model is trained, written, kept, used or asked."""
    return key in _ANYONES or _UNRELATED.search(key) is not None


def computing(config: Configuration) -> dict[str, Any]:
    """The settings that outputs depend on, by name, as JSON holds them; special tokens, which users set, are none of them, and whether
    tensors are tied, which these tell, is none."""
    found = {
        name: _listed(value)
        for name, value, known in _settings(plain(config))
        if known and not name.endswith(("_token_id", "tie_word_embeddings"))
    }
    return {name: value for name, value in found.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def plain(config: Configuration) -> Mapping[str, Any]:
    """A configuration as its file has it."""
    return config.to_dict() if isinstance(config, PretrainedConfig) else config


def as_class(cls: type[PretrainedConfig], file: Mapping[str, Any]) -> Configuration:
    """A file as a class reads it, with its defaults; what another class wrote as it is."""
    ours = _of_kind(file, cls.model_type)
    if not ours:
        return file
    try:
        return cls.from_dict(dict(ours[0]))
    except Exception:  # of any type: what a class makes of a file
        return file


def _of_kind(file: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """The configurations of models of a kind in a file: its own, or those of parts."""
    inner = (part for part in file.values() if isinstance(part, Mapping))
    return [f for f in (file, *inner) if f.get("model_type", "") == kind]


def parts(
    config: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The settings of a model and of each model inside, without those, and what stands before their names: "" and ``decoder.``."""
    inside = {key: value for key, value in config.items() if _is_part(key, value)}
    yield within, {k: value for k, value in config.items() if k not in inside}
    for key, value in inside.items():
        if isinstance(value, Mapping):
            yield from parts(value, f"{within}{key}.")


def _is_part(key: str, value: Any) -> bool:
    named = isinstance(value, Mapping) and "model_type" in value
    return named or key.endswith("_config")


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Names and values of settings that outputs depend on, or may depend on; and whether they are known to."""
    for within, part in parts(config):
        part = _in_one_spelling(part)
        for key, value in part.items():
            if key == "rope_scaling":
                yield within + key, _scaling(value), True
            elif key in COMPUTED or _matters(key, value, part):
                if key == "eos_token_id" and value == _LARGEST_TOKEN:
                    tokens = part.get("vocab_size")
                    value = tokens - 1 if type(tokens) is int else value
                yield within + key, value, True
            elif not is_unrelated(key):
                yield within + key, value, False


def _matters(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether outputs of a family depend on a setting that others' do not depend on."""
    if key in _BY_FAMILY:
        return _family(config) in _BY_FAMILY[key]
    if key.endswith("max_position_embeddings"):
        return _kind(config.get("rope_scaling")) in _BY_LENGTH
    if key != "pad_token_id" or value is None:
        return False
    heads = config.get("architectures") or ()
    of_texts = any(str(head).endswith(_OF_TEXTS) for head in heads)
    return of_texts or _family(config) in _POSITIONS_BY_PADDING


def _family(config: Mapping[str, Any]) -> str:
    """What a configuration is of; files may say anything there."""
    return str(config.get("model_type", ""))


def _listed(value: Any) -> Any:
    """A value as JSON has it, which knows no tuples."""
    if isinstance(value, (list, tuple)):
        return [_listed(one) for one in value]
    if isinstance(value, Mapping):
        return {key: _listed(one) for key, one in value.items()}
    return value


def _in_one_spelling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary positions as transformers 4 writes them; 5 writes them into one setting, unless they differ by kind of layer."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or _kind(rope) is None:
        return config
    apart = {k: v for k, v in rope.items() if k in COMPUTED}
    scaling = {k: v for k, v in rope.items() if k not in COMPUTED}
    rest = {k: v for k, v in config.items() if k != "rope_parameters"}
    return {**rest, **apart, "rope_scaling": scaling}


def _kind(scaling: Any) -> str | None:
    """Kind of scaled rotary positions, under either name that it has had."""
    if not isinstance(scaling, Mapping):
        return None
    return scaling.get("rope_type", scaling.get("type"))


def _scaling(scaling: Any) -> Any:
    """Rotary positions' scaling in one form; None where there is none, and what is none as it is."""
    if scaling is not None and not isinstance(scaling, Mapping):
        return scaling
    kind = _kind(scaling)
    if kind in (None, "default") and not (scaling or {}).keys() - {"rope_type", "type"}:
        return None
    rest = {k: v for k, v in scaling.items() if k not in ("rope_type", "type")}
    return {**rest, "rope_type": kind}
