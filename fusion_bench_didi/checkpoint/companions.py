"""Tokenizers, processors and settings of generation that lie beside weights, and whose of them a checkpoint is given."""

import filecmp
import os
import shutil
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import unquote

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from ..errors import DiDiError
from ..files import from_home
from ..task_vectors.places import is_name

#: A directory with more layouts of conversations.
TEMPLATES = "additional_chat_templates"
_VOCABULARY = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "vocab.bpe"),
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model"),
    *("source.spm", "target.spm", "tekken.json"),
)
#: Files by their kind; all are data.
_KINDS = {
    **dict.fromkeys(_VOCABULARY, "tokenizer"),
    **dict.fromkeys(("added_tokens.json", "merges.txt", "bpe.codes"), "tokenizer"),
    **dict.fromkeys(("special_tokens_map.json", "normalizer.json"), "tokenizer"),
    "tokenizer_config.json": "tokenizer",
    **dict.fromkeys(("chat_template.jinja", "chat_template.json"), "template"),
    **dict.fromkeys(("preprocessor_config.json", "processor_config.json"), "processor"),
    "video_preprocessor_config.json": "processor",
    "generation_config.json": "generation",
}
COMPANIONS = frozenset(_KINDS)
#: Of what kinds a task takes none of the base model's, where its own checkpoint has some of a kind.
_INSTEAD = {
    "tokenizer": {"tokenizer", "template"},
    "template": {"template"},
    "processor": {"processor"},
    "generation": {"generation"},
}


class Companions(NamedTuple):
    """Files beside the weights of a model.

    Args:
        place: of the model; None if it was in memory.
        files: by their names.
        fault: why there are none, if they cannot be had.
    """

    place: str | None = None
    files: Mapping[str, Path] = MappingProxyType({})
    fault: str = ""


def companions_at(place: str | None = None, revision: str | None = None) -> Companions:
    """Those of a base model: of a directory, or of a repository of the hub, of which nothing else is fetched."""
    if place is None:
        return Companions()
    home = from_home(place)
    return _in(place, home) if home.is_dir() else _fetched(place, place, revision)


def companions_of(origin: str | None) -> Companions:
    """Those of a fine-tuned model.

    Args:
        origin: where the merge found it, as :func:`~fusion_bench_didi.pools.entries.origin_of` writes it. A name that is neither a
            directory's nor has an owner is nobody's on the hub: published models tell directories by such names.
    """
    if origin is None:
        return Companions()
    if os.path.isabs(origin):
        home = Path(origin)
        if not home.is_dir():
            return Companions(origin, fault="is no directory")
        return _in(origin, home)
    repository, _, rest = origin.partition("@")
    revision, _, folder = rest.partition("/")
    if not is_name(repository):
        return Companions(origin, fault="is a name, and no place that is known here")
    return _fetched(origin, repository, unquote(revision) or None, folder)


def companions_for(
    of_base: Companions, own: Companions, *, own_vocabulary: bool = False
) -> Companions:
    """Those of a task: of its own fine-tuned model, and of what kinds that has none the base model's.

    Args:
        own_vocabulary: the tokens are others than the base model's, so that nothing is taken from its tokenizer.

    Returns:
        the files, the place of the fine-tuned model, and why its own are not among them, if they cannot be had.
    """
    tuned, fault = dict(own.files), own.fault
    kinds = {kind_of(name) for name in tuned}
    if "tokenizer" in kinds and not tuned.keys() & {*_VOCABULARY}:
        tuned = {n: file for n, file in tuned.items() if kind_of(n) != "tokenizer"}
        kinds.discard("tokenizer")
        fault = "has a tokenizer without a vocabulary"
    left = set().union(*(_INSTEAD[kind] for kind in kinds))
    if own_vocabulary:
        left |= _INSTEAD["tokenizer"]
    base = {n: file for n, file in of_base.files.items() if kind_of(n) not in left}
    return Companions(own.place, {**base, **tuned}, fault)


def unlike(found: Companions, of_base: Companions) -> Companions:
    """What a task needs beside files of the base model: those of kinds that go together, if some of them are others."""
    files = {
        name: file
        for kinds in ({"tokenizer", "template"}, {"processor"}, {"generation"})
        if not _same(of_kinds(found, kinds).files, of_kinds(of_base, kinds).files)
        for name, file in of_kinds(found, kinds).files.items()
    }
    return found._replace(files=files)


def of_kinds(found: Companions, kinds: Set[str]) -> Companions:
    """Those that are for some uses alone."""
    return found._replace(
        files={n: file for n, file in found.files.items() if kind_of(n) in kinds}
    )


def _same(files: Mapping[str, Path], others: Mapping[str, Path]) -> bool:
    return files.keys() == others.keys() and all(
        filecmp.cmp(file, others[name], shallow=False) for name, file in files.items()
    )


def copy_companions(
    directory: Path,
    of_base: Companions,
    own: Companions = Companions(),
    *,
    own_vocabulary: bool = False,
) -> str | None:
    """Put files beside a checkpoint, those of :func:`companions_for`.

    Returns:
        what could not be had, if anything.

    Raises:
        DiDiError: for a file that cannot be read after all.
    """
    place, files, fault = companions_for(of_base, own, own_vocabulary=own_vocabulary)
    copy_files(directory, files)
    if any(kind_of(name) != "generation" for name in files):
        if not fault:
            return None
        return f"the tokenizer, or the processor, is not the fine-tuned model's own: {place} {fault}."
    why = [
        f"{place} {fault or 'holds none'}"
        for place, fault in ((place, fault), (of_base.place, of_base.fault))
        if place
    ]
    told = "; ".join(why) or "the model was in memory"
    way = (
        "Copy them."
        if own_vocabulary
        else "Name the base model's directory or repository (base), or copy them."
    )
    return f"no tokenizer or processor was copied: {told}. {way}"


def kind_of(name: str) -> str:
    """What a file is for: tokenizer, template, processor or generation."""
    return "template" if name.startswith(f"{TEMPLATES}/") else _KINDS[name]


def copy_files(directory: Path, files: Mapping[str, Path]) -> None:
    """Put files into a directory, by their names in it, but where there is one already.

    Raises:
        DiDiError: for a file that cannot be read.
    """
    for name, source in files.items():
        target = directory / name
        if target.exists():
            continue
        target.parent.mkdir(exist_ok=True)
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise DiDiError(
                f"{source} cannot be read ({type(error).__name__}). Mend it, or go on without its task."
            ) from error


def _fetched(
    place: str, repository: str, revision: str | None, folder: str = ""
) -> Companions:
    names = [*sorted(COMPANIONS), f"{TEMPLATES}/*.jinja"]
    wanted = [f"{folder}/{name}" if folder else name for name in names]
    try:
        home = snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        fault = f"is no directory and cannot be fetched ({type(error).__name__})"
        return Companions(place, fault=fault)
    return _in(place, Path(home, folder))


def _in(place: str, home: Path) -> Companions:
    """Files of a directory, if whatever has such a name can be read."""
    try:
        found = dict(_named(home))
        for name, file in found.items():
            if not (file.is_file() and os.access(file, os.R_OK)):
                return Companions(place, fault=f"has a {name} that cannot be read")
    except OSError as error:
        return Companions(place, fault=f"cannot be read ({type(error).__name__})")
    return Companions(place, found)


def _named(home: Path) -> Iterator[tuple[str, Path]]:
    there = {*os.listdir(home)}
    yield from ((name, home / name) for name in sorted(COMPANIONS & there))
    for file in sorted((home / TEMPLATES).glob("*.jinja")):
        yield f"{TEMPLATES}/{file.name}", file
