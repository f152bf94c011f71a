"""From a host model pool to aligned task vectors, without loading the T models where files can be read directly."""

import logging
from pathlib import Path
from typing import Any

from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils.modelscope import resolve_repo_path
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .errors import ModelPoolError
from .naming import normalised
from .sources import (
    ModuleSource,
    PickleSource,
    SafetensorsSource,
    TensorSource,
    aligned,
)
from .task_vectors import TaskVectors

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
        twin = seen.setdefault(normalised(name), name)
        if twin != name:
            raise ModelPoolError(
                f"Duplicate task names: {twin!r} and {name!r} mean the same task ({normalised(name)!r}). Rename one."
            )


def load_backbone(modelpool: BaseModelPool) -> nn.Module:
    """The base model, independent of what the pool holds."""
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
    stored = _file_source(modelpool, BASE)
    ignored: frozenset[str] = frozenset()
    if backbone is not None:
        base: TensorSource = ModuleSource(backbone, BASE)
        if stored is not None:
            names = set(base.infos())
            ignored = frozenset(set(aligned(stored, names).infos()) - names)
    elif stored is not None:
        base = stored
    else:
        base = ModuleSource(modelpool.load_pretrained_model(), BASE)
    return TaskVectors(
        base,
        {
            name: _file_source(modelpool, name)
            or ModuleSource(_load(modelpool, name), name)
            for name in modelpool.model_names
        },
        exclude=tuple(exclude),
        as_vectors=tuple(as_vectors),
        ignored=ignored,
    )


def _load(modelpool: BaseModelPool, name: str) -> nn.Module:
    log.info("%s is not a directory of safetensors files; loading the model.", name)
    return modelpool.load_model(name)


def _file_source(modelpool: BaseModelPool, name: str) -> TensorSource | None:
    """The safetensors (or weights-only pickle) behind a pool entry, or None if there is no such file."""
    repo = _repository(modelpool._models[name])
    if repo is None:
        return None
    platform = getattr(modelpool, "_platform", "hf")
    directory = Path(
        resolve_repo_path(repo_id=repo, repo_type="model", platform=platform)
    )
    if not directory.is_dir():
        return None
    source = SafetensorsSource.of_directory(directory, name)
    if source is None and (directory / "pytorch_model.bin").is_file():
        source = PickleSource(directory / "pytorch_model.bin", name)
    return source


def _repository(entry: Any) -> str | None:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, (dict, DictConfig)):
        target = str(entry.get("_target_", ".from_pretrained"))
        plain = entry.get("subfolder") is None and entry.get("revision") is None
        if target.endswith(".from_pretrained") and plain:
            return entry.get("pretrained_model_name_or_path")
    return None
