"""What fine-tuned checkpoints say of their task beside weights: what its classes are called, how it writes, how it is graded."""

from collections.abc import Iterator, Mapping
from typing import Any

from fusion_bench.modelpool import BaseModelPool
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from ..task_vectors.file_sources import read_settings
from .carried import PROBLEM, carried
from .configurations import as_class, plain
from .entries import adapter_directory, configuration_of, home_of

#: kinds of settings, by which a merged model's facts have them of every task that has some
LABELS, GENERATION, CONFIGURATION = "labels", "generation", "configuration"
TASK_SETTINGS = (LABELS, GENERATION, CONFIGURATION)
FILE = "generation_config.json"
_PLAIN = (bool, int, float, str, type(None))


def task_settings(
    modelpool: BaseModelPool, backbone: nn.Module
) -> dict[str, dict[str, dict[str, Any]]]:
    """Settings of tasks that are other than the base model's, JSON-plain.

    Returns:
        by kind and task: names of classes by their position as text, values of a ``GenerationConfig``, and those of a
        configuration that are :mod:`.carried`; kinds of which no task has some are left out.

    Raises:
        CheckpointMismatchError: for a file of settings that cannot be read.
    """
    kinds = dict(zip(TASK_SETTINGS, (_labels, _generation, _configuration)))
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in kinds}
    for name in modelpool.model_names:
        if adapter_directory(modelpool, name):
            continue  # says nothing of them
        for kind, read in kinds.items():
            if told := read(modelpool, name, backbone):
                found[kind][name] = told
    return {kind: told for kind, told in found.items() if told}


def _labels(modelpool: BaseModelPool, name: str, backbone: nn.Module) -> dict[str, str]:
    tuned = _names(configuration_of(modelpool, name))
    return tuned if tuned != _names(getattr(backbone, "config", None)) else {}


def _names(config: Any) -> dict[str, str]:
    found = plain(config)
    names = found.get("id2label") if isinstance(found, Mapping) else None
    if not isinstance(names, Mapping):
        return {}
    return {str(place): str(name) for place, name in names.items()}


def _configuration(
    modelpool: BaseModelPool, name: str, backbone: nn.Module
) -> dict[str, Any]:
    base = getattr(backbone, "config", None)
    tuned = configuration_of(modelpool, name)
    if not isinstance(base, PretrainedConfig):
        return {}
    if isinstance(tuned, Mapping):
        tuned = as_class(type(base), tuned)
    elif not isinstance(tuned, PretrainedConfig):
        return {}
    here, there = carried(base), carried(tuned)
    # where heads are of other shapes the base model's is forgotten
    always = set() if len(_names(base)) == len(_names(tuned)) else {PROBLEM}
    return {
        key: value
        for key, value in there.items()
        if here.get(key) != value or (key in always and value is not None)
    }


def _generation(
    modelpool: BaseModelPool, name: str, backbone: nn.Module
) -> dict[str, Any]:
    base = getattr(backbone, "generation_config", None)
    if not isinstance(base, GenerationConfig):
        return {}
    tuned = _generation_config(modelpool, name, backbone)
    if tuned is None:
        return {}
    here, there = dict(_values(base)), dict(_values(tuned))
    keys = sorted(here.keys() | there.keys())
    return {k: there.get(k) for k in keys if here.get(k) != there.get(k)}


def _generation_config(
    modelpool: BaseModelPool, name: str, backbone: nn.Module
) -> GenerationConfig | None:
    """As ``from_pretrained`` finds it: in its own file, or in the model's configuration."""
    entry = modelpool._models[name]
    if isinstance(entry, nn.Module):
        return getattr(entry, "generation_config", None)
    home, config = home_of(modelpool, name), configuration_of(modelpool, name)
    if home is None or config is None:
        return None
    if (file := home.directory / FILE).is_file():
        told = read_settings(file, name, "settings of generation")
        return GenerationConfig.from_dict(told)
    read = as_class(type(backbone.config), config)
    if not isinstance(read, PretrainedConfig):
        return None
    return GenerationConfig.from_model_config(read)


def _values(config: GenerationConfig) -> Iterator[tuple[str, Any]]:
    for key, value in config.to_dict().items():
        each = value if isinstance(value, list) else [value]
        told = key[0] != "_" and key != "transformers_version"
        if told and all(isinstance(one, _PLAIN) for one in each):
            yield key, value
