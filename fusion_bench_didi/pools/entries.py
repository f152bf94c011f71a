"""Entries of a host pool: what ``from_pretrained`` is called with, where that lies, and the model as the pool gives it."""

import copy
import functools
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils.modelscope import resolve_repo_path
from omegaconf import DictConfig
from torch import nn

from ..errors import DiDiError, ModelPoolError
from ..files import from_home
from ..task_vectors.file_sources import read_settings
from ..task_vectors.live_models import check_values, uncompiled
from ..task_vectors.lora_config import CONFIG
from ..task_vectors.places import check_place
from ..task_vectors.tower_names import fill, is_tower
from .carried import CARRIED
from .configurations import COMPUTED
from .weight_files import WeightFiles, check_configured

BASE = "_pretrained_"
PLACE, TARGET = "pretrained_model_name_or_path", "_target_"
TYPES = ("dtype", "torch_dtype")
#: Whose ways of loading a model are known here.
_PACKAGES = {"fusion_bench", "fusion_bench_didi"}


def load_model(modelpool: BaseModelPool, name: str) -> nn.Module:
    """A model as the pool gives it, whole: a pool that would load it lazily is asked for all of it.

    Raises:
        ModelPoolError: if it gives something else than a model, or its directory has no configuration.
        CheckpointMismatchError: if its weights are not in memory, or not those of its checkpoint.
    """
    entry = modelpool._models[name]
    if isinstance(entry, nn.Module) and not has_own_loader(modelpool):
        check_values(entry, repr(name))
        return entry
    if getattr(modelpool, "enable_lazy_loading", False):
        whole = eager(modelpool, entry)
        modelpool = copy.copy(modelpool)
        modelpool.enable_lazy_loading = False
        modelpool._models = {**modelpool._models, name: whole}
    check_instantiable(modelpool, name)
    if home := home_of(modelpool, name):
        home.check_unmerged()
        home.check_counts()
    try:
        if name == BASE:
            model = modelpool.load_pretrained_model()
        else:
            model = modelpool.load_model(name)
    except DiDiError:
        raise
    except Exception as error:  # of any type, of the host and of what it calls
        raise ModelPoolError(
            f"{type(modelpool).__name__} cannot load {name!r} from {entry!r} ({type(error).__name__}: {error}). Mend its entry in the "
            "pool."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelPoolError(
            f"{type(modelpool).__name__} gives a {type(model).__name__} for {name!r}, expected a model (torch.nn.Module). "
            "Give an entry with a _target_ that loads one."
        )
    model = uncompiled(model)
    check_values(model, repr(name))
    if home and is_tower(model):
        fill(model, home.open())
    return model


def check_instantiable(modelpool: BaseModelPool, name: str) -> None:
    """The directory of an entry that a class of transformers loads holds a configuration; what others load is theirs to check.

    Raises:
        ModelPoolError: if it holds none.
    """
    entry = _arguments(modelpool, name)
    if entry is None or has_own_loader(modelpool) or _ELSEWHERE & entry.keys():
        return
    place, target = entry.get(PLACE), str(entry.get(TARGET, _LIBRARY))
    known = target.partition(".")[0] == _LIBRARY
    if known and isinstance(place, (str, os.PathLike)):
        check_configured(from_home(place), entry.get("subfolder") or "", name)


def is_loaded_by_known(modelpool: BaseModelPool, name: str) -> bool:
    """Whether the class that loads an entry is one of transformers or of the host, which go by config.json."""
    if has_own_loader(modelpool):
        return False
    target = (_arguments(modelpool, name) or {}).get(TARGET, _LIBRARY)
    return str(target).partition(".")[0] in {_LIBRARY, *_PACKAGES}


def has_own_loader(modelpool: BaseModelPool) -> bool:
    """Whether a pool loads models by a method of its user's: what it makes of their files, no file tells."""
    loader = vars(modelpool).get("load_model") or type(modelpool).load_model
    return loader.__module__.partition(".")[0] not in _PACKAGES


def _names_architectures(modelpool: BaseModelPool) -> bool:
    """Whether text as an entry names an architecture of torchvision, not where a model lies."""
    return getattr(modelpool, "type", None) == "torchvision"


def origin_of(modelpool: BaseModelPool, name: str) -> str | None:
    """Where the model of an entry lies, as it can be found from anywhere: an absolute directory, or a repository of the hub, with
    revision and folder where some are asked for (``user/name@revision/folder``); None for a model in memory.
    """
    given = _arguments(modelpool, name) or {}
    place, folder = given.get(PLACE), str(given.get("subfolder") or "")
    if not isinstance(place, (str, os.PathLike)):
        return None
    if (local := from_home(place)).is_dir():
        return str(local.absolute() / folder)
    if not (folder or given.get("revision")):
        return os.fspath(place)
    revision = quote(str(given.get("revision") or "main"), safe="")
    return f"{os.fspath(place)}@{revision}/{folder}".rstrip("/")


def adapter_directory(modelpool: BaseModelPool, name: str) -> Path | None:
    """Where the adapter behind a pool entry lies; with both in a directory, transformers too takes the adapter."""
    if has_own_loader(modelpool):
        return None
    directory = directory_of(modelpool, name)
    return directory if directory and (directory / CONFIG).is_file() else None


def home_of(modelpool: BaseModelPool, name: str) -> WeightFiles | None:
    """The weights that an entry asks for, and the settings beside them; None where only the host knows where they lie."""
    directory = directory_of(modelpool, name)
    if directory is None:
        return None
    entry = _arguments(modelpool, name)
    inside, *which = map(entry.get, ("subfolder", "variant", "use_safetensors"))
    return WeightFiles(directory / (inside or ""), name, *which)


def directory_of(modelpool: BaseModelPool, name: str) -> Path | None:
    """Where the repository of an entry lies; None where only the host knows.

    Raises:
        ModelPoolError: for an entry without a place, and one whose place cannot be had.
    """
    found = asked(modelpool, name)
    if found is None:
        return None
    repo, _ = found
    if not repo or not isinstance(repo, (str, os.PathLike)):
        raise ModelPoolError(
            f"{name!r} has {PLACE}={repo!r}, expected a directory or a name on the hub. Mend its entry in the pool."
        )
    directory = _resolved(repo, getattr(modelpool, "_platform", "hf"))
    return directory if directory.is_dir() else None


def _resolved(repo: str, platform: str) -> Path:
    """Where a repository lies; a local directory is looked at anew, and the hub, which is slow to answer, asked once."""
    local = from_home(repo)
    return local if local.is_dir() else _downloaded(repo, platform)


@functools.cache
def _downloaded(repo: str, platform: str) -> Path:
    try:
        if platform == "hf":
            check_place(repo, owned=False)
        found = resolve_repo_path(repo_id=repo, repo_type="model", platform=platform)
    except FileNotFoundError as error:
        raise ModelPoolError(str(error)) from error
    except Exception as error:  # of any type, of hubs and networks
        raise ModelPoolError(
            f"{repo!r} is neither a directory nor a model that can be had from the hub ({error}). Mend the path or the name."
        ) from error
    return Path(found)


#: Arguments of ``from_pretrained`` that are of the machine, or of how it loads.
OF_MACHINE = frozenset(
    {
        *("_partial_", "cache_dir", "local_files_only", "low_cpu_mem_usage"),
        *("device_map", "max_memory", "use_cache", "use_flash_attention_2"),
        *("offload_buffers", "offload_folder", "offload_state_dict"),
    }
)
#: Those that do not change which weights are read, nor what they are.
_HARMLESS = OF_MACHINE | {
    *(TARGET, PLACE, *TYPES, "attn_implementation", "num_labels"),
    *("token", "trust_remote_code"),
}
#: Those that are understood here.
_KNOWN = {"variant", "use_safetensors", "subfolder"}
#: Whose classes read config.json; those of entries that name none are of it too.
_LIBRARY = "transformers"
#: Those that say where a configuration comes from in place of config.json.
_ELSEWHERE = {"adapter_kwargs", "config", "gguf_file"}
#: Those that ``from_pretrained`` puts into the configuration.
_CONFIGURED = COMPUTED | CARRIED


def eager(modelpool: BaseModelPool, entry: Any) -> Any:
    """An entry; of a pool that loads lazily it may name a class in place of its ``from_pretrained``."""
    lazy = getattr(modelpool, "enable_lazy_loading", False)
    if not lazy or not isinstance(entry, (dict, DictConfig)) or TARGET not in entry:
        return entry
    name = entry[TARGET].removesuffix(".from_pretrained")
    return type(entry)({**entry, TARGET: f"{name}.from_pretrained"})


def given_by(modelpool: BaseModelPool) -> dict[str, Any]:
    """Arguments that the pool hands to every ``from_pretrained``; they come before those of an entry."""
    found: dict[str, Any] = {}
    for place in ("model_kwargs", "_model_kwargs"):
        found |= dict(getattr(modelpool, place, None) or {})
    return found


def _arguments(modelpool: BaseModelPool, name: str) -> dict[str, Any] | None:
    """Arguments of ``from_pretrained`` for an entry; None for other entries."""
    entry = modelpool._models[name]
    if isinstance(entry, str) and not _names_architectures(modelpool):
        entry = {PLACE: entry}
    if not isinstance(entry, (dict, DictConfig)):
        return None
    return {**eager(modelpool, entry), **given_by(modelpool)}


def configuration_of(modelpool: BaseModelPool, name: str) -> Any:
    """The configuration of an entry: an object, its file's content with what the entry adds to it, or None."""
    entry = modelpool._models[name]
    if isinstance(entry, nn.Module):
        return getattr(entry, "config", None)
    home = home_of(modelpool, name)
    if home is None or not (file := home.directory / "config.json").is_file():
        return None
    home.check_counts()
    arguments = _arguments(modelpool, name)
    added = {key: value for key, value in arguments.items() if key in _CONFIGURED}
    return read_settings(file, name, "a model's configuration") | added


def asked(modelpool: BaseModelPool, name: str) -> tuple[Any, str] | None:
    """Repository of an entry, and the folder in it; None where only the host knows."""
    entry = _arguments(modelpool, name)
    if entry is None or set(entry) - _HARMLESS - _KNOWN - _CONFIGURED:
        return None
    if not str(entry.get(TARGET, ".from_pretrained")).endswith(".from_pretrained"):
        return None
    return entry.get(PLACE), entry.get("subfolder") or ""
