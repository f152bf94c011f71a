"""What models compute beside their weights: where a fine-tuned model says something else than the base model, no merge is its."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

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
    }
)
#: Families whose head scales its input where it is tied to the embedding.
_SCALED_WHERE_TIED = {"t5", "mt5", "umt5", "longt5", "switch_transformers"}
#: Families whose layers are one, run so many times.
_SHARED_LAYERS = {"albert"}
#: Families that count positions from the token that pads.
_POSITIONS_BY_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer"),
    *("m2m_100", "markuplm", "mpnet", "nllb-moe", "roberta", "roberta-prelayernorm"),
    *("prophetnet", "xlm-prophetnet", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
#: How heads of whole texts are called, some of which find the last token by what pads.
_OF_TEXTS = "ForSequenceClassification"
#: Families that are pooled at the token that ends a text, and the number that stands for the largest token there.
_POOLED_AT_END = {
    *("clip_text_model", "clipseg_text_model", "groupvit_text_model"),
    *("metaclip_2_text_model", "aimv2_text_model"),
}
_LARGEST_TOKEN = 2
#: Kinds of positions that depend on the longest text of pre-training.
_BY_LENGTH = {"dynamic", "yarn", "longrope"}

#: A configuration, or the content of its file.
Configuration = PretrainedConfig | Mapping[str, Any]


def check_configurations(base: Any, tuned: Mapping[str, Any]) -> None:
    """The base model runs all tasks: under its configuration they must compute what they did.

    Args:
        tuned: by task; what is no configuration says nothing.

    Raises:
        CheckpointMismatchError: listing all differences of all tasks.
    """
    known = (Mapping, PretrainedConfig)
    for task, config in tuned.items():
        if isinstance(config, known) and isinstance(base, known):
            kind, other = (plain(c).get("model_type") for c in (base, config))
            if kind and other and not _of_kind(plain(config), kind):
                log.warning("%s is a %s, run as a %s as the base model is.", task, other, kind)  # fmt: skip
    faults = [
        f"{task}: {found}"
        for task, config in tuned.items()
        if isinstance(config, known) and isinstance(base, known)
        for found in differing(base, config)
    ]
    if faults:
        raise CheckpointMismatchError(
            "Fine-tuned models compute something else with their weights than the base model, under which all tasks run (base "
            "model's != fine-tuned model's):\n  "
            + "\n  ".join(faults)
            + "\nTake these models out of the pool. One that may run as the base model does can be given the base model's "
            "value, or the base model theirs: beside its place in modelpool.models, in its config.json, or in the module's config."
        )


def differing(base: Configuration, tuned: Configuration) -> list[str]:
    """Differences of two configurations in the computation, as ``name: base model's != fine-tuned model's``.

    What one of them leaves out is not compared; models in models of one kind are found in one another.
    """
    if isinstance(base, PretrainedConfig) and isinstance(tuned, Mapping):
        tuned = as_class(type(base), tuned)
    here, there = (dict(_settings(plain(config))) for config in (base, tuned))
    return [
        f"{name}: {value!r} != {there[name]!r}"
        for name, value in here.items()
        if name in there and _listed(there[name]) != _listed(value)
    ]


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


def _settings(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    config = _in_one_spelling(config)
    scaling = config.get("rope_scaling")
    kind = _kind(scaling)
    for key, value in config.items():
        if key == "rope_scaling":
            yield within + key, _scaling(value)
        elif key in COMPUTED:
            yield within + key, value
        elif key == "tie_word_embeddings":
            if config.get("model_type") in _SCALED_WHERE_TIED:
                yield within + key, value
        elif key == "num_hidden_layers":
            if config.get("model_type") in _SHARED_LAYERS:
                yield within + key, value
        elif key == "max_position_embeddings":
            if kind in _BY_LENGTH:
                yield within + key, value
        elif key == "pad_token_id":
            if value is not None and _reads_padding(config):
                yield within + key, value
        elif key == "eos_token_id":
            if config.get("model_type") in _POOLED_AT_END:
                if value == _LARGEST_TOKEN and "vocab_size" in config:
                    value = config["vocab_size"] - 1
                yield within + key, value
        elif key.endswith("_config") and isinstance(value, Mapping):
            yield from _settings(value, f"{within}{key}.")


def _reads_padding(config: Mapping[str, Any]) -> bool:
    heads = config.get("architectures") or ()
    of_texts = any(str(head).endswith(_OF_TEXTS) for head in heads)
    return of_texts or config.get("model_type") in _POSITIONS_BY_PADDING


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
    """Rotary positions' scaling in one form; None where there is none."""
    kind = _kind(scaling)
    if kind in (None, "default") and not (scaling or {}).keys() - {"rope_type", "type"}:
        return None
    rest = {k: v for k, v in scaling.items() if k not in ("rope_type", "type")}
    return {**rest, "rope_type": kind}
