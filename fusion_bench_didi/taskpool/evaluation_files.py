"""Local files that a task pool evaluates on, and what tells them from others.

They are found where pools keep what they load: datasets by task, tokenizers and processors, and models of their own. What
lies on the hub or in memory is not among them.
"""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..checkpoint.companions import COMPANIONS
from ..files import file_digest
from ..task_vectors.watched import glimpse

#: Attributes of pools that name what they load beside datasets.
_TOKENIZERS = ("tokenizer", "_tokenizer", "_processor", "_data_processor")
_MODELS = ("_clip_model", "heads", "_classifier_heads")
#: What tells the classes of a suite.
_DESCRIBED = ("suite.json", "tasks.json")
#: Files that reading leaves beside what is read.
_LEFT = ("*/__pycache__/*", "*.pyc", "*/cache-*.arrow", "*.lock")
#: Bytes of a file that is read whole; of a larger one its size and some blocks.
_WHOLE = 2**26
#: Files of a task that are read; of more, their names and sizes.
_MANY = 2**12


def evaluation_files(taskpool: Any) -> dict[str, dict[str, str]]:
    """Checksums of the local files that a task pool reads, by task or by what they are to it, and by name."""
    found = dict(_datasets(taskpool))
    reads = {"root": _DESCRIBED.__contains__}
    reads |= dict.fromkeys(_TOKENIZERS, COMPANIONS.__contains__)
    reads |= dict.fromkeys(_MODELS, _is_of_model)
    for attribute, read in reads.items():
        label = f"taskpool.{attribute.strip('_')}"
        found[label] = found.get(label) or _beside(taskpool, attribute, read)
    lm_eval = _configured(taskpool, "include_path")
    found["taskpool.include_path"] = _all_of(lm_eval)
    return {label: _checksums(files) for label, files in found.items() if files}


def _datasets(taskpool: Any) -> Iterator[tuple[str, list[Path]]]:
    """The files of each task's dataset."""
    given = _configured(taskpool, "_test_datasets")
    for task, dataset in given.items() if isinstance(given, Mapping) else ():
        split = dataset.get("split") if isinstance(dataset, Mapping) else ""
        yield str(task), _all_of(dataset, str(split))


def _all_of(value: Any, split: str = "") -> list[Path]:
    """Files that are named, and those in named directories: of the split, where their names tell it."""
    words, files = set(re.findall("[a-z]+", split.lower())), []
    for place in _places(value):
        there = {place: set()} if place.is_file() else dict(_within(place))
        files += [f for f, told in there.items() if words & told] or there
    return files


def _beside(taskpool: Any, attribute: str, reads: Callable[[str], bool]) -> list[Path]:
    """Files that are named, and what is read of named directories."""
    files = []
    for place in _places(_configured(taskpool, attribute)):
        if place.is_file():
            files.append(place)
        else:
            files += [f for f in place.iterdir() if f.is_file() and reads(f.name)]
    return files


def _is_of_model(name: str) -> bool:
    weights = name.endswith(".safetensors") or name.startswith("pytorch_model")
    return weights or name == "config.json"


def _configured(taskpool: Any, attribute: str) -> Any:
    value = getattr(taskpool, attribute, None)
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return value


def _places(value: Any) -> Iterator[Path]:
    """What is there of the files, directories and patterns that a configuration names."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            if not str(key).startswith("_") and key not in ("split", "name"):
                yield from _places(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            if isinstance(one, (str, Path)):  # samples in memory are none
                yield from _places(one)
    elif isinstance(value, (str, Path)) and str(value):
        text = os.path.expanduser(value)
        if os.path.exists(text):
            yield Path(text)
        elif glob.has_magic(text):
            yield from map(Path, sorted(glob.glob(text, recursive=True)))


def _within(directory: Path) -> Iterator[tuple[Path, set[str]]]:
    """Files that are not hidden, nor left there by reading, and the words in their names."""
    for file in directory.rglob("*"):
        name = file.relative_to(directory)
        hidden = any(part.startswith(".") for part in name.parts)
        left = any(fnmatch(f"/{name.as_posix()}", pattern) for pattern in _LEFT)
        if file.is_file() and not (hidden or left):
            yield file, {*re.split("[^a-z]+", str(name).lower())}


def _checksums(files: Sequence[Path]) -> dict[str, str]:
    """By name, seen from the directory that holds all of them, so that it may be moved."""
    whole = sorted({os.path.abspath(file) for file in files})
    place = os.path.commonpath([os.path.dirname(file) for file in whole])
    named = {os.path.relpath(file, place): Path(file) for file in whole}
    if len(named) <= _MANY:
        return {name: _checksum(file) for name, file in named.items()}
    sizes = [f"{name} {file.stat().st_size}\n" for name, file in named.items()]
    return {"*": hashlib.sha256("".join(sizes).encode()).hexdigest()}


def _checksum(file: Path) -> str:
    return file_digest(file) if file.stat().st_size <= _WHOLE else glimpse(file)
