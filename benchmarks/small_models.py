"""Small random models of any architecture of transformers, out of configurations that are cut down field by field.

No architecture is named here: what a field means is told by its name, what a model takes by its forward.
"""

import re
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

WIDTH, VOCABULARY, SIDE, PATCH, LARGEST = 32, 64, 32, 8, 2_000_000
#: largest value of whole numbers by the name of their field; the first pattern that matches all of it counts
AT_MOST = (
    (r".*vocab_size.*|codebook_size|n_token", VOCABULARY),
    (r"(num|n)_(key_value|kv)_heads|num_query_groups", 2),
    (r"n_heads?|num_(attention_)?heads?|.*(attention|num|n)_heads", 4),
    (r".*(position_embeddings|positions?|_seq_len|seq_length|sequence_length)|n_ctx", 64),
    (r".*layers?|.*depth|.*num_blocks|num_.*_blocks|n_blocks", 2),
    (r".*(intermediate_size|ffn_dim|ffn_size|hidden_size_mlp|feed_?forward_dim|feedforward_size).*|d_ff|d_inner|n_inner|ffn_hidden_size", 48),
    (r".*num_.*experts|n_routed_experts|num_experts", 4),
    (r".*experts_per_tok(en)?|moe_topk|moe_k|n_shared_experts", 2),
    (r"n_group|topk_group", 1),
    (r"rotary_dim|.*rope_head_dim", 4),
    (r".*(head_dim|head_size|kv_channels|low_rank_dim|lora_rank)|d_kv|d_head|mamba_d_head|mamba_d_state|state_size", 8),
    (r".*image_size|img_size|input_size|.*_resolution", SIDE),
    (r".*patch_size", PATCH),
    (r"window_size", 4),
    (r"sliding_window|attention_window|local_attention|.*chunk_(length|size)", 16),
    (r"num_queries|num_query_tokens|.*num_latents|.*_max_length|num_object_queries", 16),
    (r".*(hidden_size|_dim|_width|_channels|embedding_size|embed_size|filter_size|_size_per_layer_input)|d_model|n_embd|dim|width|d_embed", WIDTH),
)  # fmt: skip
#: the same for every number of a list
EACH_AT_MOST = (
    (r".*depths?|.*num_blocks|layers|num_layers|.*layers", 1),
    (r".*heads", 2),
    (r"image_size", SIDE),
    (r"patch_size", PATCH),
    (r".*(hidden_sizes|dims?|channels|widths|embed_dims|sizes)", WIDTH),
)
_TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"}
TOKENS = re.compile(r".*(_token_(id|index|ids)|_idx|_token)|.*_index")

#: what the defaults of an architecture lack
OTHERWISE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bamba", "granitemoehybrid"), {"mamba_n_heads": 8, "mamba_d_head": 8}),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8}),
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text", "glm4v_moe_text"),
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    ),
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "informer": {"prediction_length": 8},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16]},
    "swin": {"window_size": 2, "depths": [1, 1], "num_heads": [2, 2]},
    "donut-swin": {"window_size": 2, "depths": [1, 1], "num_heads": [2, 2]},
    "time_series_transformer": {"prediction_length": 8},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "bit": {"num_groups": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["full_attention", "sliding_attention"]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3], "n_mamba_heads": 8, "mamba_headdim": 8},
    "longcat_flash": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
}  # fmt: skip


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration of the same class with small sides."""
    small = type(config)(**_changes(config))
    if getattr(small, "pad_token_id", 0) is None:
        small.pad_token_id = 0
    if small.is_encoder_decoder and getattr(small, "decoder_start_token_id", 0) is None:
        small.decoder_start_token_id = 0
    return small


def _changes(config: PretrainedConfig) -> dict[str, Any]:
    """Arguments for a small one, those of configurations inside with them."""
    found: dict[str, Any] = {}
    for name in sorted(_arguments(type(config)) | _TOKENS):
        value = getattr(config, name, None)
        if isinstance(value, PretrainedConfig):
            found[name] = {"model_type": value.model_type, **_changes(value)}
        elif isinstance(value, int) and not isinstance(value, bool):
            smaller = _smaller(name, value)
            if smaller != value:
                found[name] = smaller
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):  # fmt: skip
            limit = _limit(EACH_AT_MOST, name)
            if limit is not None and max(value) > limit:
                found[name] = type(value)(v if v <= 4 and limit > 4 else min(v, limit) for v in value)  # fmt: skip
    return {**found, **OTHERWISE.get(config.model_type, {})}


def _arguments(kind: type) -> set[str]:
    """Names of what the constructors of a configuration take."""
    kinds = [k for k in kind.__mro__ if issubclass(k, PretrainedConfig)]
    return {
        name
        for k in kinds
        if k is not PretrainedConfig and "__init__" in vars(k)
        for name in signature(k.__init__).parameters
    }


def _smaller(name: str, value: int) -> int:
    if TOKENS.fullmatch(name):
        return value % VOCABULARY if value >= VOCABULARY else value
    limit = _limit(AT_MOST, name)
    return value if limit is None else min(value, limit)


def _limit(table: tuple[tuple[str, int], ...], name: str) -> int | None:
    return next((most for p, most in table if re.fullmatch(p, name)), None)


def small_model(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A random model of a class, the same at every call.

    Raises:
        ValueError: if it would not be small.
    """
    config = small_config(kind.config_class())
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(config).parameters())
    except NotImplementedError:  # values are looked at
        size = 0
    if size > LARGEST:
        raise ValueError(f"{size} parameters where every known field is small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(small_config(kind.config_class())).float().eval()
    _filled(model)
    return model


@torch.no_grad()
def _filled(model: nn.Module) -> None:
    """Values where the class leaves memory as it found it, or zeros that would hide what a tensor does."""
    generator = torch.Generator().manual_seed(1)
    for value in model.parameters():
        if not value.is_floating_point() or not value.numel():
            continue
        if not 0 < float(value.abs().max()) < 1e3:  # NaN neither
            value.copy_(0.02 * torch.randn(value.shape, generator=generator))


@torch.no_grad()
def fine_tuned(
    model: PreTrainedModel, seed: int, *, frozen: bool = False
) -> dict[str, Tensor]:
    """A task's tensors: matrices change by a low rank and noise, all others by noise.

    Args:
        frozen: leave every second tensor as it is.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for place, (_, value) in enumerate(sorted(model.named_parameters())):
        trained = value.is_floating_point() and value.requires_grad
        if not trained or (frozen and place % 2):
            continue
        scale = 0.2 * float(value.std()) if value.numel() > 1 else 0.0
        change = noise(*value.shape)
        if value.ndim > 1:
            n = value[0].numel()
            low = (noise(len(value), 2) @ noise(2, n)).view(value.shape)
            change = 0.3 * change + low
        value += max(scale, 0.05) * change
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value += 0.1 * noise(*value.shape)
    return model


def inputs(model: PreTrainedModel, count: int = 4) -> Iterator[dict[str, Tensor]]:
    """Batches that the forward might take, the likeliest first."""
    generator = torch.Generator().manual_seed(2)
    names = set(signature(model.forward).parameters)
    config = model.config

    def tokens(length: int) -> Tensor:
        return torch.randint(4, 50, (count, length), generator=generator)

    def values(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    text = {}
    if "input_ids" in names:
        text["input_ids"] = tokens(8)
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int):
            text["input_ids"][:, -1] = end
        if "attention_mask" in names:
            text["attention_mask"] = torch.ones(count, 8).long()
    if config.is_encoder_decoder and "decoder_input_ids" in names:
        text["decoder_input_ids"] = tokens(5)
    side = _field(config, "image_size", SIDE)
    channels = _field(config, "num_channels", 3)
    mels = _field(config, "num_mel_bins", 80)
    pictures = {"pixel_values": values(channels, *(side if isinstance(side, (list, tuple)) else (side, side)))}  # fmt: skip
    if "input_ids" in names:
        if (
            "pixel_values" in names
            and (seen := _image_tokens(model, pictures)) is not None
        ):
            yield {"input_ids": torch.cat([seen, text["input_ids"]], 1), **pictures}
        yield text
        yield {n: v for n, v in text.items() if not n.startswith("decoder")}
        if "pixel_values" in names:
            yield {**text, **pictures}
        if "bbox" in names:
            yield {**text, "bbox": torch.ones(count, 8, 4).long()}
    decoder = {n: v for n, v in text.items() if n.startswith("decoder")}
    if "pixel_values" in names:
        yield {**pictures, **decoder}
        yield {"pixel_values": values(channels, 64, 64), **decoder}
        frames = _field(config, "num_frames", 16)
        yield {"pixel_values": values(frames, channels, *pictures["pixel_values"].shape[2:])}  # fmt: skip
    if "pixel_values_videos" in names:
        frames = _field(config, "frames_per_clip", 16)
        yield {"pixel_values_videos": values(frames, 3, side, side)}
    if "input_values" in names:
        yield {"input_values": values(4000), **decoder}
        yield {"input_values": values(_field(config, "max_length", 64), mels)}
        yield {"input_values": values(1, 4000)}
    if "input_features" in names:
        positions = _field(config, "max_source_positions", 32)
        features = _field(config, "feature_size", _field(config, "input_dim", mels))
        width = _field(config, "feature_projection_input_dim", mels)
        for shape in ((mels, 2 * positions), (64, mels), (64, width), (64, features)):
            yield {"input_features": values(*shape), **decoder}
    if "past_values" in names:
        length = _field(config, "context_length", 32)
        yield {"past_values": values(length, _field(config, "num_input_channels", 1))}
        yield {"past_values": values(length)}
    if "inputs" in names:
        yield {"inputs": values(16, _field(config, "d_model", WIDTH))}
    if "waveform" in names:
        yield {"waveform": values(4000)}


def _image_tokens(model: PreTrainedModel, pictures: dict[str, Tensor]) -> Tensor | None:
    """What stands for a picture in a text, as many tokens as the model makes features of one; None where it does not say."""
    token, features = _field(model.config, "image_token_id", None), None
    if isinstance(token, int) and hasattr(model, "get_image_features"):
        try:
            with torch.no_grad():
                features = model.get_image_features(**pictures)
        except Exception:  # of any type: it takes something else
            return None
    while isinstance(features, (tuple, list)) and features:
        features = torch.cat(features) if features[0].ndim == 2 else features[0]
    count = len(pictures["pixel_values"])
    if not isinstance(features, Tensor) or features.numel() % (count * features.shape[-1]):  # fmt: skip
        return None
    each = features.numel() // (count * features.shape[-1])
    return torch.full((count, each), token)


def _field(config: PretrainedConfig, name: str, otherwise: Any) -> Any:
    """A field of a configuration, or of one inside."""
    inside = [v for v in vars(config).values() if isinstance(v, PretrainedConfig)]
    for one in (config, *inside):
        if getattr(one, name, None) is not None:
            return getattr(one, name)
    return otherwise
