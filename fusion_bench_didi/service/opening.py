"""The runner of a merged model's directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer

from ..checkpoint.deltas import read_config
from ..checkpoint.hub import local_directory
from ..checkpoint.loaders import place_of
from ..errors import SettingsError
from ..files import as_text
from ..models import DynamicModel, Serving, overview
from .classification import Classification, Heads
from .language import Language
from .limits import Limits
from .processors import processors_of

Runner = Language | Classification


def open_runner(
    directory: str | Path,
    *,
    base: str | None = None,
    heads: str | Path | None = None,
    limits: Limits = Limits(),
    device: str = "cpu",
    dtype: str | None = None,
) -> Runner:
    """The model of a directory, with what makes inputs of texts or images for each task.

    Args:
        base: where the base model lies, and its tokenizer or image processor, if not where the merge took it; those of tasks are
            looked for where it took their models.
        heads: of towers that have none, see :class:`~.classification.Heads`.
        limits: of requests.
        dtype: that the backbone is run in; as it was merged if None.

    Raises:
        SettingsError: for models that answer neither in text nor in classes, heads of models that have their own, and tasks whose
            tokens nothing here makes.
        CheckpointMismatchError: if the base model's tokenizer or image processor is missing and needed.
    """
    place = local_directory(directory)
    config = read_config(place)
    model = DynamicModel.from_pretrained(place, base).eval().to(device)
    if dtype is not None:
        _cast(model.backbone, getattr(torch, dtype))
    model.serving = Serving(memory_limit_gb=limits.memory_limit_gb)
    name = type(model.backbone).__name__
    kind = _kind(model, name, heads)
    images, directions = kind == "images", None
    if heads is not None:
        projected = "WithProjection" in name
        settings = model.backbone.config
        width = settings.projection_dim if projected else settings.hidden_size
        directions = Heads.read(heads, model.tasks, width)
    auto = AutoImageProcessor if images else AutoTokenizer
    known = config["backbone"].get("source")
    revision = known.get("revision") if isinstance(known, Mapping) and not base else None  # fmt: skip
    where = as_text(base) if base else _beside(known, place)
    processors = processors_of(model, auto, where, revision)
    if kind == "language":
        return Language(model, processors, limits)
    return Classification(model, processors, images=images, limits=limits, heads=directions)  # fmt: skip


def _cast(backbone: nn.Module, dtype: torch.dtype) -> None:
    """What checkpoints hold in another type; frequencies that are worked out stay as they are, as ``from_pretrained`` leaves them."""
    for tensor in backbone.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _kind(model: DynamicModel, name: str, heads: Any) -> str:
    config: Mapping[str, Any] | Any = model.backbone.config
    towers = "VisionModel" in name
    if heads is not None and not towers:
        raise SettingsError(f"heads={heads}: {name} needs none; leave them out.")
    if name.endswith("ForSequenceClassification"):
        return "text"
    if name.endswith("ForImageClassification") or (towers and heads is not None):
        return "images"
    if towers:
        raise SettingsError(
            f"{name} answers with vectors. Give --heads, safetensors with a tensor (classes, width) per task."
        )
    if name.endswith(("ForCausalLM", "LMHeadModel")) and not config.is_encoder_decoder:
        return "language"
    raise SettingsError(
        f"{name} is neither a causal language model nor a classifier, which are what is served."
    )


def _beside(source: str | Mapping[str, Any] | None, place: Path) -> str | None:
    """Where a saved model's base model lies, whose place may be relative to the model's."""
    named = overview.place_of(source)
    return None if named is None else place_of(named, place)
