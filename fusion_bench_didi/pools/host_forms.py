"""The forms in which the host's model pools describe their models, brought to one: a name, and an entry that loads."""

from collections.abc import Mapping
from typing import Any

from fusion_bench.compat import modelpool as first_version
from fusion_bench.modelpool import BaseModelPool
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..errors import ModelPoolError
from ..task_vectors.live_models import uncompiled
from .entries import BASE, PLACE, TARGET

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
_MAPPINGS = (Mapping, DictConfig)
_BY_NAME = f"models by name: {BASE} and the tasks"
#: What an entry of a list says beside its place, as far as it changes no weights.
_LISTED = {"name", "path", "is_trainable", "merge_and_unload"}


def as_pool(modelpool: Any) -> BaseModelPool:
    """A host pool of today's form, also from a plain dictionary of modules or a pool of the host's first version.

    A pool stays the same object; entries that lack the class that its pool is of are given it, and what ``torch.compile`` wrapped
    is taken out, as its tensors have other names.

    Raises:
        ModelPoolError: for what is no pool, models that are not given by name, and entries without a value.
    """
    if isinstance(modelpool, first_version.ModelPool):
        return _with_mapping(modelpool)
    if not isinstance(modelpool, BaseModelPool):
        modelpool = BaseModelPool(_named(modelpool))
    if not isinstance(modelpool._models, (*_MAPPINGS, nn.ModuleDict)):
        raise ModelPoolError(
            f"modelpool.models of the {type(modelpool).__name__} is a {type(modelpool._models).__name__}, expected {_BY_NAME}."
        )
    unknown = {n: error for n in modelpool._models if (error := _unknown(modelpool, n))}
    if unknown:
        raise ModelPoolError(
            f"Entries of modelpool.models have no value: {unknown}. Give them one."
        )
    entries = dict(modelpool._models.items())
    names = {cls.__name__ for cls in type(modelpool).__mro__}
    kind = next((k for k in CLASSES if k in names), None)
    found = {name: _completed(entry, kind) for name, entry in entries.items()}
    if any(entry is not entries[name] for name, entry in found.items()):
        live = any(isinstance(entry, nn.Module) for entry in found.values())
        keeps = isinstance(modelpool._models, DictConfig) and not live
        modelpool._models = OmegaConf.create(found) if keeps else found
    return modelpool


def _named(models: Any) -> Any:
    """Models that were given without a pool."""
    if not isinstance(models, (*_MAPPINGS, nn.ModuleDict, list, tuple, ListConfig)):
        raise ModelPoolError(
            f"The model pool is a {type(models).__name__}, expected one of the host's, or {_BY_NAME}."
        )
    if isinstance(models, _MAPPINGS) and BASE not in models and "models" in models:
        raise ModelPoolError(
            f"The model pool is the configuration of one ({', '.join(map(str, models))}), expected {_BY_NAME}. Give what it has under "
            "models, or the pool that hydra.utils.instantiate makes of it."
        )
    return list(models) if isinstance(models, (tuple, ListConfig)) else models


def _unknown(modelpool: BaseModelPool, name: Any) -> str:
    """What an entry leaves open: a value that has to be given, or one that is taken from where there is none."""
    try:
        entry = modelpool._models[name]
        if isinstance(entry, DictConfig):
            OmegaConf.to_container(entry, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        return str(error).splitlines()[0]
    return ""


def _completed(entry: Any, kind: str | None) -> Any:
    """An entry with the class of its pool, or without what ``torch.compile`` put around it."""
    if isinstance(entry, nn.Module):
        return uncompiled(entry)
    if kind is None:
        return entry
    target = {TARGET: f"transformers.{CLASSES[kind]}.from_pretrained"}
    if isinstance(entry, str) and kind not in _TAKE_STRINGS:
        return {**target, PLACE: entry}
    if isinstance(entry, _MAPPINGS) and TARGET not in entry and PLACE in entry:
        return {**target, **entry}
    return entry


def same_class(cls: type, *bases: type) -> type:
    """A class of other bases that is called as another one."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, bases, names)


class _Listed(BaseModelPool):
    """A pool of the host's first version, whose configuration is a list."""

    config = None  # today's is a property, theirs an attribute
    _train_datasets = _val_datasets = _test_datasets = None


def _with_mapping(modelpool: Any) -> BaseModelPool:
    """A pool of the host's first version that is one of today's too."""
    cls = type(modelpool)
    if not isinstance(modelpool, BaseModelPool):
        entries = getattr(modelpool, "model_dict", None) or _listed(modelpool)
        modelpool.__class__ = same_class(cls, cls, _Listed)
        modelpool._models = entries
    return modelpool


def _listed(modelpool: Any) -> dict[str, Any]:
    """The entries of its list by name."""
    config = modelpool.config
    entries = config.get("models") if isinstance(config, _MAPPINGS) else None
    if entries is None:
        raise ModelPoolError(
            f"The {type(modelpool).__name__} has no list of models, expected modelpool.models=[{{name: {BASE}, path: ...}}, ...]."
        )
    return {entry["name"]: _place(dict(entry)) for entry in entries}


def _place(entry: dict[str, Any]) -> Any:
    known = "path" in entry and not set(entry) - _LISTED
    return entry["path"] if known else entry
