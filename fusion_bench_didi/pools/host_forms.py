"""The forms in which the host's model pools describe their models, brought to one: a name, and an entry that loads."""

from collections.abc import Mapping
from typing import Any

from fusion_bench.compat import modelpool as first_version
from fusion_bench.modelpool import BaseModelPool
from omegaconf import DictConfig, OmegaConf

from .entries import PLACE, TARGET

#: Pools that are of one class of models, by their own class: what an entry without ``_target_`` means.
CLASSES = {
    "CLIPVisionModelPool": "CLIPVisionModel",
    "CausalLMPool": "AutoModelForCausalLM",
    "Seq2SeqLMPool": "AutoModelForSeq2SeqLM",
    "SequenceClassificationModelPool": "AutoModelForSequenceClassification",
    "GPT2ForSequenceClassificationPool": "GPT2Model",
}
#: Pools that load entries which are strings by themselves.
_TAKE_STRINGS = {"CLIPVisionModelPool", "CausalLMPool"}
#: What an entry of a list says beside its place, as far as it changes no weights.
_LISTED = {"name", "path", "is_trainable", "merge_and_unload"}


def as_pool(modelpool: Any) -> BaseModelPool:
    """A host pool of today's form, also from a plain dictionary of modules or a pool of the host's first version.

    A pool stays the same object; entries that lack the class that its pool is of are given it.
    """
    if isinstance(modelpool, first_version.ModelPool):
        return _with_mapping(modelpool)
    if not isinstance(modelpool, BaseModelPool):
        return BaseModelPool(modelpool)
    names = {cls.__name__ for cls in type(modelpool).__mro__}
    kind = next((k for k in CLASSES if k in names), None)
    if kind is not None:
        entries = modelpool._models
        found = {name: _completed(entry, kind) for name, entry in entries.items()}
        if any(entry is not entries[name] for name, entry in found.items()):
            keeps = isinstance(entries, DictConfig)
            modelpool._models = OmegaConf.create(found) if keeps else found
    return modelpool


def _completed(entry: Any, kind: str) -> Any:
    target = {TARGET: f"transformers.{CLASSES[kind]}.from_pretrained"}
    if isinstance(entry, str) and kind not in _TAKE_STRINGS:
        return {**target, PLACE: entry}
    mapping = isinstance(entry, (Mapping, DictConfig))
    if mapping and TARGET not in entry and PLACE in entry:
        return {**target, **entry}
    return entry


class _Listed(BaseModelPool):
    """What stands behind a class of the host's first version, whose configuration is a list."""

    config = None  # today's is a property, theirs an attribute
    _train_datasets = _val_datasets = _test_datasets = None


def _with_mapping(modelpool: Any) -> BaseModelPool:
    """A pool of the host's first version that is one of today's too."""
    cls = type(modelpool)
    if not isinstance(modelpool, BaseModelPool):
        same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        modelpool.__class__ = type(cls.__name__, (cls, _Listed), same)
        live = getattr(modelpool, "model_dict", None)
        modelpool._models = live or {
            entry["name"]: _place(dict(entry)) for entry in modelpool.config["models"]
        }
    return modelpool


def _place(entry: dict[str, Any]) -> Any:
    known = "path" in entry and not set(entry) - _LISTED
    return entry["path"] if known else entry
