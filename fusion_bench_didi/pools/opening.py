"""From a host model pool to aligned task vectors, without loading the T models where files can be read directly."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils.modelscope import resolve_repo_path
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..errors import ModelPoolError
from ..task_vectors.lora_adapter import AdapterSource, fan_in_first
from ..task_vectors.lora_config import CONFIG
from ..task_vectors.reader import TaskVectors
from ..task_vectors.sources import (
    ModuleSource,
    PickleSource,
    SafetensorsSource,
    TensorInfo,
    TensorSource,
    aligned,
)
from .task_names import normalized

log = logging.getLogger(__name__)

BASE = "_pretrained_"


def as_pool(modelpool: Any) -> BaseModelPool:
    """A host pool, also from a plain dictionary of modules."""
    if isinstance(modelpool, BaseModelPool):
        return modelpool
    return BaseModelPool(modelpool)


def check_pool(modelpool: BaseModelPool) -> None:
    """Faults that need no file.

    Raises:
        ModelPoolError: no base model, fewer than two tasks, or names that mean the same task.
    """
    if not modelpool.has_pretrained:
        raise ModelPoolError(
            f"The pool has no base model: no {BASE!r} among {modelpool.all_model_names}. "
            f"Task vectors are differences to it; add modelpool.models.{BASE}."
        )
    names = modelpool.model_names
    if len(names) < 2:
        raise ModelPoolError(
            f"Merging needs at least two fine-tuned models, the pool has {len(names)}: {names}."
        )
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(normalized(name), name)
        if twin != name:
            raise ModelPoolError(
                f"Duplicate task names: {twin!r} and {name!r} mean the same task ({normalized(name)!r}). Rename one."
            )


def load_backbone(modelpool: BaseModelPool) -> nn.Module:
    """The base model, independent of what the pool holds.

    Raises:
        ModelPoolError: if it is an adapter.
    """
    _refuse_adapter(modelpool)
    if isinstance(modelpool._models[BASE], nn.Module):
        import copy

        return copy.deepcopy(modelpool._models[BASE])
    return modelpool.load_pretrained_model()


def backbone_reference(modelpool: BaseModelPool, backbone: nn.Module) -> dict:
    """What is needed to find the base model again: its class and where the pool took it from."""
    entry = modelpool._models[BASE]
    if isinstance(entry, DictConfig):
        entry = OmegaConf.to_container(entry, resolve=True)
    cls = type(backbone)
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "source": entry if isinstance(entry, (str, dict)) else None,
    }


def open_pool(
    modelpool: BaseModelPool,
    backbone: nn.Module | None = None,
    *,
    exclude: tuple[str, ...] = (),
    as_vectors: tuple[str, ...] = (),
) -> TaskVectors:
    """Line up the pool's checkpoints; reads headers only where they are files.

    Args:
        backbone: the base model that was loaded; its checkpoint's header stands for it if None.

    Raises:
        CheckpointMismatchError: listing all faults of all checkpoints.
    """
    base, known, ignored = base_of(modelpool, backbone)
    return TaskVectors(
        base,
        {
            name: adapter_source(modelpool, name, known, backbone)
            or _file_source(modelpool, name)
            or ModuleSource(_load(modelpool, name), name)
            for name in modelpool.model_names
        },
        exclude=tuple(exclude),
        as_vectors=tuple(as_vectors),
        ignored=ignored,
    )


def base_of(
    modelpool: BaseModelPool, backbone: nn.Module | None = None
) -> tuple[TensorSource, dict[str, TensorInfo], frozenset[str]]:
    """The base model's tensors.

    Args:
        backbone: the base model that was loaded; its checkpoint's header stands for it if None.

    Returns:
        the source; all tensors as the checkpoint stores them; the names of those that the model does not load.

    Raises:
        ModelPoolError: if it is an adapter.
    """
    _refuse_adapter(modelpool)
    stored = _file_source(modelpool, BASE)
    if backbone is not None:
        base: TensorSource = ModuleSource(backbone, BASE)
    elif stored is not None:
        base = stored
    else:
        base = ModuleSource(modelpool.load_pretrained_model(), BASE)
    names = dict(base.infos())
    if stored is None:
        return base, names, frozenset()
    found = aligned(stored, names).infos()
    return base, {**names, **found}, frozenset(set(found) - set(names))


def _refuse_adapter(modelpool: BaseModelPool) -> None:
    """A base model must be whole."""
    if directory := adapter_directory(modelpool, BASE):
        raise ModelPoolError(
            f"The base model {BASE!r} is an adapter: {directory} holds {CONFIG}, expected the weights of a model. Give "
            f"the model that the adapters were trained on as modelpool.models.{BASE}."
        )


def _load(modelpool: BaseModelPool, name: str) -> nn.Module:
    log.info("%s is not a directory of safetensors files; loading the model.", name)
    return modelpool.load_model(name)


def adapter_source(
    modelpool: BaseModelPool,
    name: str,
    known: Mapping[str, TensorInfo],
    backbone: nn.Module | None = None,
) -> AdapterSource | None:
    """The adapter behind a pool entry, or None if it is something else.

    Args:
        known: the base model's tensors.
        backbone: its modules, where they are known.
    """
    directory = adapter_directory(modelpool, name)
    if directory is None:
        return None
    turned = None if backbone is None else fan_in_first(backbone)
    return AdapterSource.of_directory(directory, name, known, turned)


def adapter_directory(modelpool: BaseModelPool, name: str) -> Path | None:
    """Where the adapter behind a pool entry lies; with both in a directory, transformers too takes the adapter."""
    directory = _directory(modelpool, name)
    return directory if directory and (directory / CONFIG).is_file() else None


def _file_source(modelpool: BaseModelPool, name: str) -> TensorSource | None:
    """The safetensors (or weights-only pickle) behind a pool entry, or None if there is no such file."""
    directory = _directory(modelpool, name)
    if directory is None:
        return None
    source = SafetensorsSource.of_directory(directory, name)
    if source is None and (directory / "pytorch_model.bin").is_file():
        source = PickleSource(directory / "pytorch_model.bin", name)
    return source


def _directory(modelpool: BaseModelPool, name: str) -> Path | None:
    repo = _repository(modelpool._models[name])
    if repo is None:
        return None
    directory = _resolved(repo, getattr(modelpool, "_platform", "hf"))
    return directory if directory.is_dir() else None


@functools.cache
def _resolved(repo: str, platform: str) -> Path:
    """Asked several times of each entry, and the hub is slow to answer."""
    return Path(resolve_repo_path(repo_id=repo, repo_type="model", platform=platform))


def _repository(entry: Any) -> str | None:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, (dict, DictConfig)):
        target = str(entry.get("_target_", ".from_pretrained"))
        plain = entry.get("subfolder") is None and entry.get("revision") is None
        if target.endswith(".from_pretrained") and plain:
            return entry.get("pretrained_model_name_or_path")
    return None
