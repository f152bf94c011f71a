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
from ..errors import CheckpointMismatchError, SettingsError, some
from ..models import DynamicModel, Serving, overview
from ..models.task_settings import with_own_vocabulary
from .classification import Classification, Heads
from .language import Language
from .limits import Limits

Runner = Language | Classification
_FILES = {
    AutoTokenizer: "tokenizer_config.json",
    AutoImageProcessor: "preprocessor_config.json",
}


def open_runner(
    directory: str | Path,
    *,
    base: str | None = None,
    heads: str | Path | None = None,
    limits: Limits = Limits(),
    device: str = "cpu",
    dtype: str | None = None,
) -> Runner:
    """The model of a directory, with what makes its inputs of texts or images.

    Args:
        base: where the base model lies, and its tokenizer or image processor, if not where the merge took it.
        heads: of towers that have none, see :class:`~.classification.Heads`.
        limits: of requests.
        dtype: that the backbone is run in; as it was merged if None.

    Raises:
        SettingsError: for models that answer neither in text nor in classes, and heads of models that have their own.
        CheckpointMismatchError: if tokenizer or image processor are missing.
    """
    place = local_directory(directory)
    config = read_config(place)
    model = DynamicModel.from_pretrained(place, base).eval().to(device)
    if dtype is not None:
        _cast(model.backbone, getattr(torch, dtype))
    model.serving = Serving(memory_limit_gb=limits.memory_limit_gb)
    source = base or _beside(config["backbone"].get("source"), place)
    name = type(model.backbone).__name__
    kind = _kind(model, name, heads)
    if kind != "images" and (others := with_own_vocabulary(model)):
        raise SettingsError(
            f"{some(others)} have a vocabulary of their own, which the base model's tokenizer does not know. Serve the model "
            "without them (didi remove-task), and them as checkpoints (didi export --form plain)."
        )
    images, directions = kind == "images", None
    if heads is not None:
        projected = "WithProjection" in name
        settings = model.backbone.config
        width = settings.projection_dim if projected else settings.hidden_size
        directions = Heads.read(heads, model.tasks, width)
    processor = _processor(AutoImageProcessor if images else AutoTokenizer, source)
    if kind == "language":
        return Language(model, processor, limits)
    return Classification(model, processor, images=images, limits=limits, heads=directions)  # fmt: skip


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


def _processor(auto: Any, where: str | None) -> Any:
    """Tokenizer or image processor of the base model, read as data."""
    file = _FILES[auto]
    try:
        if where is None or (Path(where).is_dir() and not (Path(where) / file).is_file()):  # fmt: skip
            raise OSError(f"there is no {file}")
        found = auto.from_pretrained(where, trust_remote_code=False)
        if auto is AutoTokenizer and not _knows_words(found):
            raise OSError("there is no vocabulary beside it")
        return found
    except Exception as error:  # of any type, for it comes of files of any content
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointMismatchError(
            f"The base model at {where} has no {auto.__name__.removeprefix('Auto')} that can be read: {first}. Give its "
            "directory with --base."
        ) from error


def _knows_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has a vocabulary: transformers 5 makes some of special tokens, and a mark of spaces, where the file is missing."""
    return len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) > 1
