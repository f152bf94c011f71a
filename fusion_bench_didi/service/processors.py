"""What makes inputs of texts or images: a task's own tokenizer or image processor where its checkpoint has another than the base model."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PretrainedConfig

from ..checkpoint.companions import (
    Companions,
    companions_at,
    companions_for,
    companions_of,
    copy_files,
    of_kinds,
)
from ..errors import CheckpointMismatchError, SettingsError, some
from ..files import file_digest
from ..models import DynamicModel
from ..models.task_settings import with_own_vocabulary

log = logging.getLogger(__name__)
#: Of the base model by None, which is what the router's tasks are given.
Processors = Mapping[str | None, Any]
_FILES = {
    AutoTokenizer: "tokenizer_config.json",
    AutoImageProcessor: "preprocessor_config.json",
}
_KINDS = {AutoTokenizer: {"tokenizer", "template"}, AutoImageProcessor: {"processor"}}
_NAMES = {AutoTokenizer: "tokenizer", AutoImageProcessor: "image processor"}


def processors_of(
    model: DynamicModel, auto: Any, where: str | None, revision: str | None = None
) -> Processors:
    """Tokenizers or image processors by task, one object for all whose files are equal; the base model's too, if some task has
    none of its own or a router finds tasks.

    Args:
        auto: ``AutoTokenizer`` or ``AutoImageProcessor``.
        where: the base model lies; None if nobody knows.
        revision: of its repository.

    Raises:
        SettingsError: for tasks with a vocabulary of their own whose tokenizer is not found, or that a router could find.
        CheckpointMismatchError: if the base model's is missing.
    """
    others = set(with_own_vocabulary(model)) if auto is AutoTokenizer else set()
    if others and model.router is not None:
        raise _unknown(others, "and a router, which reads that one's tokens, could find them. Take it off (attach_router(None))")  # fmt: skip
    own, faults = _own(model, auto, companions_at(where, revision), others)
    if missing := others & faults.keys():
        told = some(f"{task}: {faults[task]}" for task in missing)
        raise _unknown(missing, f"and their own is not found ({told}). Bring it back, or merge them anew from where it lies")  # fmt: skip
    if faults:
        log.warning(
            "The base model's %s stands in for that of %s. Mend that and start again, if theirs is another.",
            _NAMES[auto],
            some(f"{task} ({fault})" for task, fault in faults.items()),
        )
    if own.keys() == set(model.tasks) and model.router is None:
        return own
    base = _of_base(auto, where, revision)
    return {None: base, **dict.fromkeys(model.tasks, base), **own}


def _unknown(tasks: set[str], why: str) -> SettingsError:
    return SettingsError(
        f"{some(tasks)} have a vocabulary of their own, which the base model's tokenizer does not know, {why}, or serve the model "
        "without them (didi remove-task), and them as checkpoints (didi export --form plain)."
    )


def _own(
    model: DynamicModel, auto: Any, of_base: Companions, others: set[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """By task, what it has of its own, and why what it may have cannot be had.

    Args:
        others: tasks for which the base model's is none.
    """
    parents, config = model.info.get("parents", {}), model.backbone.config
    of_base = of_kinds(of_base, _KINDS[auto])
    digest = cache(file_digest)  # the base model's files are many tasks'

    def contents(files: Mapping[str, Path]) -> frozenset[tuple[str, str]]:
        return frozenset((name, digest(file)) for name, file in files.items())

    shared = contents(of_base.files)
    made: dict[frozenset, Any] = {shared: None}
    own: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for task in model.tasks:
        its = of_kinds(companions_of(parents.get(task)), _KINDS[auto])
        place, files, fault = companions_for(of_base, its, own_vocabulary=task in others)  # fmt: skip
        if task in others and not (files or fault):
            fault = "holds none" if place else "the model was in memory"
        try:
            content = contents(files) if files else shared
            if content not in made:
                made[content] = _read_files(auto, files, config)
            if content != shared:
                own[task] = made[content]
        except Exception as error:  # of any type, for it comes of files of any content
            fault = f"has a {_NAMES[auto]} that cannot be read: {_first(error)}"
        if fault:
            faults[task] = f"{place} {fault}" if place else fault
    return own, faults


def _read_files(auto: Any, files: Mapping[str, Path], config: PretrainedConfig) -> Any:
    """Of files of several places, beside the configuration by which some are told apart."""
    with TemporaryDirectory() as place:
        config.to_json_file(Path(place, "config.json"))
        copy_files(Path(place), files)
        return _read(auto, place)


def _of_base(auto: Any, where: str | None, revision: str | None) -> Any:
    file = _FILES[auto]
    try:
        if where is None or (Path(where).is_dir() and not (Path(where) / file).is_file()):  # fmt: skip
            raise OSError(f"there is no {file}")
        return _read(auto, where, **({"revision": revision} if revision else {}))
    except Exception as error:  # of any type, for it comes of files of any content
        raise CheckpointMismatchError(
            f"The base model at {where} has no {auto.__name__.removeprefix('Auto')} that can be read: {_first(error)}. Give its "
            "directory with --base."
        ) from error


def _read(auto: Any, where: str, **options: str) -> Any:
    """Read as data."""
    found = auto.from_pretrained(where, trust_remote_code=False, **options)
    if auto is AutoTokenizer:
        if not _knows_words(found):
            raise OSError("there is no vocabulary beside it")
        found("")  # which lets go of a saved truncation before threads share it
    return found


def _knows_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has a vocabulary: transformers 5 makes some of special tokens, and a mark of spaces, where the file is missing."""
    return len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) > 1


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
