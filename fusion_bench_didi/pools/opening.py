"""From a host model pool to aligned task vectors, without loading the T models where files can be read directly."""

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.modulator import ModulatedModel
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ModelPoolError, some
from ..task_vectors.alignment import floating
from ..task_vectors.cast import CastSource
from ..task_vectors.float8 import Float8Source
from ..task_vectors.layers import computed_otherwise, fan_in_first
from ..task_vectors.lora_adapter import AdapterSource, Values
from ..task_vectors.lora_config import CONFIG
from ..task_vectors.reader import TaskVectors
from ..task_vectors.renaming import aligned
from ..task_vectors.sources import ModuleSource, TensorInfo, TensorSource
from ..task_vectors.ties import (
    separate,
    taken_apart,
    tensor_of,
    tie,
    tied_by_peft,
    tied_names,
    untie,
)
from .configurations import check_configurations
from .entries import (
    BASE,
    PLACE,
    TYPES,
    adapter_directory,
    check_instantiable,
    configuration_of,
    eager,
    given_by,
    has_own_loader,
    home_of,
    is_loaded_by_known,
    load_model,
)
from .file_layouts import computed_on_loading, rearranged
from .live_modules import check_modules
from .names_in_memory import Names, apart, as_loaded, check_read, tied_as
from .other_bases import tell_of_other_bases
from .task_names import normalized

log = logging.getLogger(__name__)


def check_pool(modelpool: BaseModelPool) -> None:
    """Faults that need no file.

    Raises:
        ModelPoolError: no base model, fewer than two tasks, names that mean the same task, or modules that are no plain models.
    """
    if type(modelpool).__name__ == "LazyStateDictPool":
        raise ModelPoolError(
            "A LazyStateDictPool gives state dictionaries, and no model to put the merged weights into. Give the same entries to "
            "the pool of their class, CausalLMPool with enable_lazy_loading: true for instance; they are read tensor by tensor too."
        )
    if strange := [n for n in modelpool._models if not isinstance(n, str)]:
        raise ModelPoolError(
            f"Names of models are text, the pool has {strange}. Write {str(strange[0])!r}."
        )
    if nameless := [n for n in modelpool._models if not n.strip()]:
        raise ModelPoolError(
            f"The pool has a model called {nameless[0]!r}. Give it a name: its task is asked for by it, and files are called so."
        )
    if not modelpool.has_pretrained:
        raise ModelPoolError(
            f"The pool has no base model: no {BASE!r} among {modelpool.all_model_names}. Add modelpool.models.{BASE}."
        )
    for name, entry in modelpool._models.items():
        if isinstance(entry, ModulatedModel):
            raise ModelPoolError(
                f"{name!r} is a merged model of several tasks. Give the plain model of one, materialize(...), or the base model that it "
                "was merged from; tasks are added to it by didi add-task."
            )
        if isinstance(entry, nn.Module) and any(map(is_lazy, entry.parameters())):
            raise ModelPoolError(
                f"{name!r} has parameters that get their shapes in the first forward (nn.Lazy...). Run it once before the merge."
            )
    names = modelpool.model_names
    special = {n for n in modelpool._models if n not in names} - {BASE, "_merged_"}
    if special:
        log.warning("%s: names in underscores are no tasks to the host.", special)
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
        ModelPoolError: if it is an adapter, or the pool gives something else than a model, or one that cannot be copied.
        CheckpointMismatchError: if its weights are not in memory, or not those of its checkpoint.
    """
    _check_base(modelpool)
    entry = load_model(modelpool, BASE)
    if isinstance(entry, nn.parallel.DistributedDataParallel):
        raise ModelPoolError(
            f"The base model {BASE!r} is wrapped in DistributedDataParallel, which cannot be copied. Give its module."
        )
    if not isinstance(modelpool._models[BASE], nn.Module):
        if source := _opened(modelpool, BASE):
            check_read(source, Names.of(entry))
        separate(entry)
        return entry
    try:
        backbone = copy.deepcopy(entry)
        tie(backbone, tied_names(entry))
    except Exception as error:  # of tensors that are computed, locks, open files, ...
        raise ModelPoolError(
            f"The base model {BASE!r} ({type(entry).__name__}) cannot be copied ({type(error).__name__}: {error}). "
            f"{_to_copy(entry)}Give an entry with a _target_ that loads it."
        ) from error
    separate(backbone)
    return backbone


def _to_copy(model: nn.Module) -> str:
    """What makes a model one that can be copied, where that is known."""
    held = [
        (f"{name}.{key}" if name else key, value)
        for name, module in model.named_modules()
        for key, value in chain(vars(module).items(), module._parameters.items())
        if isinstance(value, torch.Tensor)
    ]
    if computed := [name for name, value in held if not value.is_leaf]:
        return f"{some(computed)} are kept with gradients, as by weight norms and pruning: run it once under torch.no_grad(). Or else: "
    if sparse := [name for name, value in held if value.layout != torch.strided]:
        return f"{some(sparse)} are sparse, expected dense tensors (to_dense()). Or else: "  # fmt: skip
    return ""


def backbone_reference(modelpool: BaseModelPool, backbone: nn.Module) -> dict:
    """Reference by which the base model is found again: its class, where the pool took it from, and what was not there."""
    cls, fresh = type(backbone), _fresh(modelpool, Names.of(backbone))
    name, source = f"{cls.__module__}.{cls.__qualname__}", backbone_source(modelpool)
    told = {} if fresh is None else {"fresh": sorted(fresh)}
    return {"class": name, "source": source, **told}


def backbone_source(modelpool: BaseModelPool) -> str | dict | None:
    """Where the pool takes the base model from, as it can be written down; None for a model in memory.

    Raises:
        ModelPoolError: naming an argument that cannot be written down.
    """
    entry = modelpool._models[BASE]
    if isinstance(entry, DictConfig):
        entry = OmegaConf.to_container(entry, resolve=True)
    if isinstance(entry, dict) and _whole(entry):
        entry = entry["config_path"]
    given = {k: v for k, v in given_by(modelpool).items() if k not in TYPES}
    if given and isinstance(entry, str):
        entry = {PLACE: entry}
    if isinstance(entry, dict):
        entry = {**eager(modelpool, entry), **given}
        return {key: _written(value, key) for key, value in entry.items()}
    return entry if isinstance(entry, str) else None


def _written(value: Any, key: str) -> Any:
    """The argument of an entry as JSON has it: types, devices and paths by their names."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        return [_written(one, key) for one in value]
    if isinstance(value, (Mapping, DictConfig)):
        return {str(name): _written(one, key) for name, one in value.items()}
    raise ModelPoolError(
        f"The base model {BASE!r} has {key} of {type(value).__name__}, which cannot be written down beside the merged model. "
        "Give text or numbers, or the loaded model in place of the entry."
    )


def _fresh(modelpool: BaseModelPool, names: Names) -> frozenset[str] | None:
    """Tensors of the base model that its checkpoint does not hold; None where only the host knows what it reads."""
    if isinstance(modelpool._models[BASE], nn.Module):
        return frozenset()
    stored = _file_source(modelpool, BASE, names)
    if stored is None:
        return None
    buffers = (name for name, _ in names.module.named_buffers())
    there = {*buffers, *stored.infos(), *taken_apart(names.module)}
    return frozenset(set(names.infos) - there)


def _whole(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of the host's image classification pools is a checkpoint as it is, with its own head."""
    given = {key for key, value in entry.items() if value is not None}
    return given - {"pretrained"} == {"config_path"} and entry.get("pretrained", True)


def open_pool(
    modelpool: BaseModelPool,
    backbone: nn.Module | None = None,
    *,
    exclude: Iterable[str] = (),
    as_vectors: Iterable[str] = (),
    own: Iterable[str] = (),
) -> TaskVectors:
    """Line up the pool's checkpoints; reads headers only where they are files.

    Args:
        backbone: the base model that was loaded; its checkpoint's header stands for it if None. Tensors that it ties are
            taken apart where a fine-tuned model needs them to differ.

    Raises:
        CheckpointMismatchError: listing all faults of all checkpoints, or else of all configurations.
    """
    if backbone is not None:
        untie_for(modelpool, backbone, modelpool.model_names)
    base, known, ignored = base_of(modelpool, backbone)
    names, buffers, fresh = None, frozenset(), frozenset()
    if backbone is not None:
        names = Names.of(backbone)
        buffers = frozenset(name for name, _ in backbone.named_buffers())
        fresh = _fresh(modelpool, names) or frozenset()
    tuned, configurations, live = {}, {}, {}
    for name in modelpool.model_names:
        tuned[name] = adapter_source(modelpool, name, base, known, names)
        if tuned[name] is not None:
            continue
        whole = _file_source(modelpool, name, names)
        if whole is not None:
            configurations[name] = configuration_of(modelpool, name)
        else:
            log.info("%s is read through the model that the pool loads.", name)
            live[name] = model = load_model(modelpool, name)
            configurations[name] = config = getattr(model, "config", None)
            whole = Float8Source.over(ModuleSource(model, name), config)
            whole = whole if names is None else tied_as(whole, names, model)
        tuned[name] = CastSource.over(aligned(whole, floating(base)), base)
    patterns = {"exclude": exclude, "as_vectors": as_vectors, "own": own}
    vectors = TaskVectors(
        base,
        tuned,
        **{key: tuple(value) for key, value in patterns.items()},
        buffers=buffers,
        fresh=fresh,
        ignored=ignored,
        loaded=backbone is not None,
    )
    config = getattr(base, "config", None) or configuration_of(modelpool, BASE)
    check_configurations(config, configurations)
    tell_of_other_bases(modelpool, tuned)
    if backbone is not None:
        check_modules(backbone, live)
    return vectors


def untie_for(
    modelpool: BaseModelPool, backbone: nn.Module, tasks: Iterable[str]
) -> None:
    """Take tied tensors of the base model apart that differ from one another in a fine-tuned model."""
    untie(backbone, needed_apart(modelpool, backbone, tasks))


def needed_apart(
    modelpool: BaseModelPool, backbone: nn.Module, tasks: Iterable[str]
) -> set[str]:
    """Names of tied tensors of the base model that differ from the others in a fine-tuned model."""
    names, found = Names.of(backbone), set[str]()
    for task in tasks if names.aliases else ():
        if directory := adapter_directory(modelpool, task):
            tied = {alias: names.infos[name] for alias, name in names.aliases.items()}
            known, values = {**names.infos, **tied}, partial(tensor_of, backbone)
            adapter = _adapter(directory, task, known, backbone, values)
            found |= adapter.apart(names.aliases, tied_by_peft(backbone))
        elif isinstance(modelpool._models[task], nn.Module):
            found |= apart(ModuleSource(load_model(modelpool, task), task), names)
        elif source := _opened(modelpool, task):
            found |= apart(source, names)
    return found


def base_of(
    modelpool: BaseModelPool, backbone: nn.Module | None
) -> tuple[TensorSource, dict[str, TensorInfo], dict[str, TensorInfo]]:
    """The base model's tensors.

    Args:
        backbone: the base model that was loaded; its checkpoint's header stands for it if None.

    Returns:
        the source; all tensors as the checkpoint stores them; those that the model does not load.

    Raises:
        ModelPoolError: if it is an adapter, or its directory has no configuration.
    """
    _check_base(modelpool)
    if backbone is None:
        check_instantiable(modelpool, BASE)
        stored = _file_source(modelpool, BASE)
        base = stored or ModuleSource(load_model(modelpool, BASE), BASE)
    else:
        stored = _file_source(modelpool, BASE, Names.of(backbone))
        base = ModuleSource(backbone, BASE, stored)
    names = dict(base.infos())
    if stored is None:
        return base, names, {}
    found = aligned(stored, names).infos()
    ignored = {name: info for name, info in found.items() if name not in names}
    return base, {**names, **found}, ignored


def _check_base(modelpool: BaseModelPool) -> None:
    """A base model must be whole, and of numbers that are read."""
    if directory := adapter_directory(modelpool, BASE):
        raise ModelPoolError(
            f"The base model {BASE!r} is an adapter: {directory} holds {CONFIG}, expected the weights of a model. Give "
            f"the model that the adapters were trained on as modelpool.models.{BASE}."
        )
    if is_loaded_by_known(modelpool, BASE) and (home := home_of(modelpool, BASE)):
        home.check_quantization()


def adapter_source(
    modelpool: BaseModelPool,
    name: str,
    base: TensorSource,
    known: Mapping[str, TensorInfo],
    names: Names | None,
) -> AdapterSource | None:
    """The adapter behind a pool entry, or None if it is something else.

    Args:
        base: the base model, of whose values DoRA takes some.
        known: its tensors as the checkpoint stores them.
        names: the base model in memory, where it is known.
    """
    directory = adapter_directory(modelpool, name)
    if directory is None:
        return None
    if names is None:
        return AdapterSource.of_directory(directory, name, known, values=base.read)
    source = _adapter(directory, name, known, names.module, base.read)
    source.leave_out_copies(names.aliases)
    return source


def _adapter(
    directory: Path,
    label: str,
    known: Mapping[str, TensorInfo],
    backbone: nn.Module,
    values: Values,
) -> AdapterSource:
    """An adapter of a base model in memory."""
    return AdapterSource.of_directory(
        directory,
        label,
        known,
        fan_in_first=fan_in_first(backbone),
        layout=partial(rearranged, model=backbone),
        values=values,
        unlike=partial(_unlike_peft, backbone),
    )


def _unlike_peft(backbone: nn.Module, weight: str) -> str:
    """Why PEFT computes something else with factors of a weight than with the changed weight; empty where it does not."""
    try:
        module = backbone.get_submodule(weight.rpartition(".")[0])
    except AttributeError:  # no module of this base model
        return ""
    return computed_otherwise(module)


def _file_source(
    modelpool: BaseModelPool, name: str, names: Names | None = None
) -> TensorSource | None:
    """The weight files behind a pool entry, under the names in memory; None where only the host knows what it would read."""
    source = _opened(modelpool, name)
    if source is None or names is None:
        return source
    if computed_on_loading(list(source.infos()), names.module):
        return None
    return as_loaded(source, names, home_of(modelpool, name).directory)


def _opened(modelpool: BaseModelPool, name: str) -> TensorSource | None:
    """The weight files behind a pool entry, under their own names; None where only the host knows what it would read."""
    home = None if has_own_loader(modelpool) else home_of(modelpool, name)
    if home is None:
        return None
    home.check_counts()  # before a class reads the configuration
    return home.open()
