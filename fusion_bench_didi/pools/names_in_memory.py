"""The names that a model has in memory for the tensors of a checkpoint, as ``from_pretrained`` of its class would give them.

Files and modules call tensors differently: legacy names (``gamma``, ``beta``), prefixes that come and go with a head, multimodal
models whose files keep an older layout, and tied tensors, of which a file holds one name, another, or all.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import CheckpointMismatchError
from ..task_vectors.file_sources import read_settings
from ..task_vectors.renaming import RenamedSource, renaming
from ..task_vectors.sources import TensorInfo, TensorSource, described
from ..task_vectors.ties import tied_names
from .file_layouts import loaded_names


@dataclass(frozen=True)
class Names:
    """The tensors of a model in memory.

    Args:
        module: the base model.
        infos: its parameters and buffers; of tied ones the first.
        aliases: other names of tied tensors -> that name.
    """

    module: nn.Module
    infos: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> "Names":
        aliases = tied_names(module)
        tensors = {
            name: tensor
            for name, tensor in module.state_dict().items()
            if name not in aliases and isinstance(tensor, Tensor)
        }
        return cls(module, described(tensors), aliases)


def as_loaded(source: TensorSource, names: Names, directory: Path) -> TensorSource:
    """A whole checkpoint under the names that its tensors have in memory.

    Tied tensors must be equal in it, see :func:`apart`.

    Args:
        directory: of the checkpoint, whose configuration tells whether its head is tied.
    """
    label, mapped = source.label, _mapped(source, names)
    kind = type(names.module).__name__
    meant: dict[str, list[str]] = {}
    unused: dict[str, str] = {}
    for old in source.infos():
        new = names.aliases.get(mapped.get(old), mapped.get(old))
        if new is None or (new not in names.infos and _ignored(new, names.module)):
            unused[old] = f"not loaded by {kind}"
        else:
            meant.setdefault(new, []).append(old)
    faults: dict[str, str] = {}
    for new, (first, *others) in meant.items():
        unused.update(dict.fromkeys(others, f"tied to {first}, and equal"))
        twins = (name for name in others if mapped[name] == mapped[first])
        if differ := [name for name in twins if not _equal(source, first, name)]:
            faults[new] = f"is held as {first} and as {differ[0]}, which differ"
    found = {new: several[0] for new, several in meant.items()}
    if (pair := _tied_head(names, directory, label)) and pair[1] in found:
        head, rows = pair
        if head in found:
            unused[found[head]] = f"tied to {found[rows]} by the configuration"
        found[head] = found[rows]
    loaded = RenamedSource(source, found, unused)
    loaded.faults |= faults
    return loaded


def tied_as(source: TensorSource, names: Names, model: nn.Module) -> TensorSource:
    """A model in memory with the tensors that the base model has: none that it ties to others, where they are equal, and those that
    it does not tie under each of their names.

    Args:
        model: that the source reads.
    """
    held = source.infos()
    unused = {
        name: f"tied to {first}, and equal"
        for name, first in names.aliases.items()
        if name in held and first in held and _equal(source, first, name)
    }
    found = {name: name for name in held if name not in unused}
    for name, first in tied_names(model).items():
        if name in names.infos and first in found:
            found[name] = first
    same = not unused and len(found) == len(held)
    return source if same else RenamedSource(source, found, unused)


def apart(source: TensorSource, names: Names) -> set[str]:
    """Tensors that the model ties to others and that differ from these in a whole checkpoint, which need not hold the first."""
    mapped = _mapped(source, names)
    back = {new: old for old, new in mapped.items()}
    tied: dict[str, list[str]] = {}
    for name, first in names.aliases.items():
        tied.setdefault(first, [first]).append(name)
    found = set[str]()
    for several in tied.values():
        first, *others = [name for name in several if name in back] or several[:1]
        found |= {n for n in others if not _equal(source, back[first], back[n])}
    return found


def _mapped(source: TensorSource, names: Names) -> dict[str, str]:
    """Name in memory by name in the file; what the class does not load is left out."""
    loaded = loaded_names(list(source.infos()), names.module)
    return _by_prefix(source, loaded, names) or loaded


def _by_prefix(
    source: TensorSource, loaded: Mapping[str, str], names: Names
) -> dict[str, str]:
    """Name in memory by name in the file, where a prefix put on or taken off explains more names than the class would load."""
    wanted = {*names.infos, *names.aliases}
    there = wanted & set(loaded.values())
    if there == wanted:
        return {}
    found = renaming(source.infos(), wanted, source.label)
    mapped = {old: new for new, old in found.items()}
    return mapped if len(wanted & {*mapped.values()}) > len(there) else {}


def check_read(source: TensorSource, names: Names) -> None:
    """A model that was loaded has the values of its file, though the file puts something in front of its names.

    Args:
        source: the tensors of the file, under the names there.

    Raises:
        CheckpointMismatchError: naming a tensor that was not read.
    """
    state = names.module.state_dict()
    loaded = loaded_names(list(source.infos()), names.module)
    for old, new in _by_prefix(source, loaded, names).items():
        if new not in state:
            continue
        stored, value = source.read(old), state[new]
        if stored.shape != value.shape or not stored.to(value).equal(value):
            raise CheckpointMismatchError(
                f"{source.label}: its file holds {new} as {old}, which {type(names.module).__name__} does not read, so that values of "
                "its own stand there. Write the file again without what is in front of its names."
            )


def _ignored(name: str, model: nn.Module) -> bool:
    """Whether the class says that it may find this tensor in a checkpoint and has no use for it."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns = (*patterns, r"position_ids$", r"rotary_emb\.inv_freq$")
    computed = name in dict(model.named_buffers())  # not of the state dict
    return computed or any(re.search(pattern, name) for pattern in patterns)


def _tied_head(names: Names, directory: Path, label: str) -> tuple[str, str] | None:
    """Names of head and embedding where a checkpoint ties them and the base model does not."""
    model, file = names.module, directory / "config.json"
    try:
        head, rows = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no language model
        return None
    where = {id(t): n for n, t in model.state_dict(keep_vars=True).items()}
    # heads of several codebooks are lists of layers
    pair = tuple(where.get(id(getattr(end, "weight", None))) for end in (head, rows))
    if None in pair or pair[0] == pair[1] or not file.is_file():
        return None
    found = read_settings(file, label, "the configuration of a model")
    try:
        tied = _ties(type(model).config_class.from_dict(found))
    except Exception as error:  # of any type: what a class makes of a file
        raise CheckpointMismatchError(
            f"{label}: {file} is not the configuration of a {type(model).__name__} ({type(error).__name__}: {error}). Download or "
            "write it again."
        ) from error
    # what the base model itself is not tied by does not tie another either
    return pair if tied and tied != _ties(model.config) else None


def _ties(config: PretrainedConfig) -> bool:
    """Whether a configuration asks for a head that is the embedding."""
    return bool(config.get_text_config(decoder=True).tie_word_embeddings)


def _equal(source: TensorSource, one: str, other: str) -> bool:
    left, right = source.read(one), source.read(other)
    return left.data_ptr() == right.data_ptr() or left.equal(right)
