"""The base model that a reference names: read as data, by classes from a closed list, never by running what a file says.

A reference comes out of a model directory, which may be from anyone. It may name a repository of the hub, or a directory,
relative to the model's own or not; and a class that is transformers', or the host's. transformers itself would run code of a
directory in some cases (``custom_generate``, adapters that name modules, kernels of the hub), so these are refused.
"""

import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import cached_file

from ..errors import DiDiError, spelled
from ..files import from_home
from ..pools.configurations import COMPUTED
from ..pools.entries import OF_MACHINE, PLACE
from ..pools.weight_files import (
    WeightFiles,
    beside,
    check_configured,
    index_files,
    pairs,
)
from ..task_vectors.lora_config import CONFIG
from ..task_vectors.places import is_name
from ..task_vectors.tower_names import fill

#: Classes of the host that its model pools load by ``from_pretrained``.
HOST_CLASSES = frozenset(
    {
        "fusion_bench.models.modeling_deepseek_v2.DeepseekV2ForCausalLM",
        "fusion_bench.models.modeling_deepseek_v2.modeling_deepseek.DeepseekV2ForCausalLM",
    }
)
#: The host's wrapper of OpenCLIP's image encoders.
OPEN_CLIP = "fusion_bench.models.open_clip.modeling.ImageEncoder"
#: Arguments of ``from_pretrained`` that a reference may hold, with their types.
ARGUMENTS: Mapping[str, type] = {
    "pretrained_model_name_or_path": str,
    "dtype": str,
    "torch_dtype": str,
    "subfolder": str,
    "revision": str,
    "variant": str,
    "attn_implementation": str,
    "num_labels": int,
    "problem_type": str,
    "pad_token_id": int,
    "bos_token_id": int,
    "eos_token_id": int,
    "add_pooling_layer": bool,
    "output_attentions": bool,
    "output_hidden_states": bool,
    "return_dict": bool,
    "tie_word_embeddings": bool,
    "ignore_mismatched_sizes": bool,
    "use_safetensors": bool,
}
#: Classes of a head, for each of which there is made room before anything of it is read.
MOST_LABELS = 2**20
#: Arguments that hold secrets.
SECRETS = frozenset({"token", "use_auth_token", "proxies"})
#: Arguments that do not change what is loaded, or are of the machine that merged.
IGNORED = SECRETS.union(
    OF_MACHINE,
    ("_convert_", "_fast_init", "_recursive_", "code_revision", "mirror"),
    ("force_download", "resume_download", "gradient_checkpointing"),
)
#: Arguments that ask for nothing.
IDLE = (
    ("trust_remote_code", False),
    ("output_loading_info", False),
    ("load_in_4bit", False),
    ("load_in_8bit", False),
    ("from_flax", False),
    ("from_tf", False),
    ("use_kernels", False),
    ("weights_only", True),
)
#: Others name kernels of the hub, which are code.
ATTENTION = frozenset(
    {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
)
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def load(
    class_name: str,
    source: str | Mapping[str, Any],
    *,
    directory: Path,
    dtype: str | None = None,
) -> tuple[nn.Module, frozenset[str]]:
    """A base model, and the names of tensors that its checkpoint does not hold.

    Args:
        class_name: of the base model, for a source that does not tell.
        source: repository or directory, or arguments of ``from_pretrained`` with a ``_target_``.
        directory: of the saved model, for relative paths.
        dtype: that it was merged in; as ``from_pretrained`` has it if None.

    Raises:
        DiDiError: for everything that is not on the lists of this module, and if it cannot be loaded.
    """
    given = {PLACE: source} if isinstance(source, str) else dict(source)
    try:
        if _is_open_clip(class_name, given):
            return _open_clip(**given), frozenset()
        make = _loader(given.pop("_target_", f"{class_name}.from_pretrained"))
        arguments = _ready(_arguments(given), directory, dtype)
        if weights := _weights(arguments):
            weights.check_unmerged()
            weights.check_counts()
        inside = arguments.get("subfolder", "")
        check_configured(Path(arguments[PLACE]), inside, "the backbone")
        model, found = make(**arguments, output_loading_info=True)
    except DiDiError:
        raise
    except Exception as error:  # of any type, for it comes of files of any content
        raise DiDiError(
            f"The backbone cannot be loaded from {source!r} ({type(error).__name__}: {error}). {_way_out()}"
        ) from error
    other = (k if isinstance(k, str) else k[0] for k in found["mismatched_keys"])
    fresh = frozenset((*found["missing_keys"], *other))
    if weights and fresh and fill(model, weights.open()):
        return model, frozenset()
    return model, fresh


def described(source: Any) -> Any:
    """A source as it is written down: without secrets and machine-bound arguments; directories by their full path."""
    if isinstance(source, str):
        return str(Path(source).absolute()) if Path(source).is_dir() else source
    if not isinstance(source, Mapping):
        return source
    kept = {k: v for k, v in source.items() if k not in IGNORED and (k, v) not in IDLE}
    return {
        k: described(v) if k == PLACE else _without_secrets(v) for k, v in kept.items()
    }


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if k not in SECRETS}
        return {k: _without_secrets(v) for k, v in kept.items()}
    return [*map(_without_secrets, value)] if isinstance(value, list) else value


def obstacle(class_name: str, source: Any) -> DiDiError | None:
    """Why :func:`load` will refuse a source, whatever lies there; None if it will not, or there is no source.

    Args:
        class_name, source: as of :func:`load`.
    """
    if source is None or _is_open_clip(class_name, source):
        return None
    given = {PLACE: source} if isinstance(source, str) else dict(source)
    try:
        _loader(given.pop("_target_", f"{class_name}.from_pretrained"))
        _arguments(given)
    except DiDiError as error:
        return error
    return None


def _is_open_clip(class_name: str, source: Any) -> bool:
    known = {"model_name", "state_dict_path"}
    mapping = isinstance(source, Mapping)
    return class_name == OPEN_CLIP and mapping and source.keys() == known


def _way_out() -> str:
    return f"Pass {spelled('backbone', '<the base model of the merge>')}."


def _refused(found: str, expected: str) -> DiDiError:
    return DiDiError(
        f"The saved model's backbone is given by {found}, expected {expected}; anything else may run code, and is not loaded. "
        f"{_way_out()}"
    )


def _loader(target: Any) -> Callable[..., Any]:
    """``from_pretrained`` of a class of transformers or the host."""
    expected = (
        "from_pretrained of a model class of transformers or the host's model pools"
    )
    name = str(target).removesuffix(".from_pretrained")
    parts = name.split(".")
    if not str(target).endswith(".from_pretrained"):
        raise _refused(f"the target {target!r}", expected)
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise _refused(f"the class {name!r}", expected)
    if name in HOST_CLASSES:
        return getattr(import_module(".".join(parts[:-1])), parts[-1]).from_pretrained
    if parts[0] != "transformers" or parts[-1].startswith("_"):
        raise _refused(f"the class {name!r}", expected)
    found = getattr(transformers, parts[-1], None)
    known = isinstance(found, type) and (
        issubclass(found, transformers.PreTrainedModel)
        or found.__module__ == "transformers.models.auto.modeling_auto"
    )
    home = ".".join(parts[:-1])
    if not known or not f"{found.__module__}.".startswith(f"{home}."):
        raise _refused(f"the class {name!r}", expected)
    return found.from_pretrained


def _open_clip(model_name: Any, state_dict_path: Any) -> nn.Module:
    if not isinstance(model_name, str) or not isinstance(state_dict_path, str):
        raise TypeError("a model name and a path are strings")
    if not Path(state_dict_path).is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{state_dict_path} is no file")
    from fusion_bench.models.open_clip import ImageEncoder

    encoder = ImageEncoder(model_name)
    state = torch.load(state_dict_path, map_location="cpu", weights_only=True)
    encoder.load_state_dict(state)
    return encoder


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained``, all of them plain."""
    found = {}
    for key, value in given.items():
        if key in IGNORED or value is None or (key, value) in IDLE:
            continue
        computed = key in COMPUTED and _is_plain(value)
        if not computed and type(value) is not ARGUMENTS.get(key):
            raise _refused(f"the argument {key}={value!r}", f"one of {list(ARGUMENTS)}")
        found[key] = value
    attention = found.get("attn_implementation", "eager")
    if attention not in ATTENTION:
        raise _refused(
            f"attn_implementation={attention!r}", f"one of {sorted(ATTENTION)}"
        )
    if (count := found.get("num_labels", 0)) > MOST_LABELS:
        raise _refused(f"num_labels={count}", f"{MOST_LABELS} at most")
    if PLACE not in found:
        raise _refused("no place", f"a {PLACE}")
    return found


def _is_plain(value: Any) -> bool:
    """Whether a configuration's file may hold the value as it is."""
    if isinstance(value, Mapping):
        return "_target_" not in value and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, bool, int, float)


def _ready(
    arguments: dict[str, Any], directory: Path, dtype: str | None
) -> dict[str, Any]:
    """Arguments with the place found and looked at, and the type as this transformers wants it."""
    asked = dtype or arguments.get("dtype") or arguments.get("torch_dtype")
    found = {k: v for k, v in arguments.items() if k not in ("dtype", "torch_dtype")}
    if asked is not None and asked != "auto":
        kind = asked.removeprefix("torch.")
        if kind not in DTYPES:
            raise _refused(f"the type {asked!r}", f"one of {sorted(DTYPES)}")
        asked = DTYPES[kind]
    if asked is not None:
        found["dtype"] = asked
    found[PLACE] = place_of(found[PLACE], directory)
    subfolder = found.get("subfolder", "")
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise _refused(f"the subfolder {subfolder!r}", "one inside")
    asked = (found.get(key) for key in ("revision", "variant"))
    _check_files(found[PLACE], subfolder, *asked)
    return {**found, "trust_remote_code": False}


def place_of(source: str, directory: Path) -> str:
    """A directory that exists, or a repository of the hub."""
    for path in (directory / source, from_home(source)):
        if path.is_dir():
            return str(path.absolute())
    if not is_name(source, owned=False):
        raise DiDiError(
            f"The backbone lay in {source!r}, where no directory is any more. {_way_out()}"
        )
    return source


def _check_files(
    place: str, subfolder: str, revision: str | None, variant: str | None
) -> None:
    """Nothing beside the weights may make transformers run code, or read what lies elsewhere."""
    for home in {Path(place), Path(place) / subfolder}:
        if os.path.lexists(home / "custom_generate"):
            raise _refused(f"{home}, which holds custom_generate", "weights only")
    file = _file_of(place, CONFIG, "", revision)
    if file is not None:
        raise _refused(f"{place}, which is an adapter", "a whole model")
    for index in index_files(variant):
        if file := _file_of(place, index, subfolder, revision):
            named = json.loads(Path(file).read_text("utf-8"))["weight_map"].values()
            if outside := [name for name in named if not beside(name)]:
                raise _refused(f"{file} with {outside[0]!r}", "files beside it")
    file = _file_of(place, "config.json", subfolder, revision)
    if file is None:
        return
    for key, value in pairs(json.loads(Path(file).read_text("utf-8"))):
        if key == "transformers_weights" and value and not beside(value):
            raise _refused(f"{file} with {key}={value!r}", "a file beside it")
        if "attn_implementation" in key:
            names = value.values() if isinstance(value, Mapping) else (value,)
            # releases around 4.50 wrote beside it whether they had chosen it themselves, which names nothing
            kinds = {str(n) for n in names if not isinstance(n, bool | None)}
            if not kinds <= ATTENTION:
                raise _refused(
                    f"{file} with {key}={value!r}", f"one of {sorted(ATTENTION)}"
                )


def _weights(arguments: Mapping[str, Any]) -> WeightFiles | None:
    """The weight files of what is loaded; None where there is no configuration beside them."""
    asked = {key: arguments.get(key) for key in ("variant", "use_safetensors")}
    inside, revision = arguments.get("subfolder", ""), arguments.get("revision")
    file = _file_of(arguments[PLACE], "config.json", inside, revision)
    return file and WeightFiles(Path(file).parent, "the backbone", **asked)


def _file_of(place: str, name: str, subfolder: str, revision: str | None) -> str | None:
    """A file of a directory or repository; None where there is none."""
    return cached_file(
        place,
        name,
        subfolder=subfolder,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
