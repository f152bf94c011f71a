"""Names of a CLIP tower's tensors: transformers 4 writes ``vision_model.`` in front of each, transformers 5 does not.

transformers 5 reads both. transformers 4 reads its own only, and leaves a tower from a file without the prefix at random
values, with a warning; :func:`fill` makes up for that. What is ours is read in either spelling.
"""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

from .sources import TensorSource

PREFIX = "vision_model."
#: From a name to the same in the other spelling.
Spelling = Callable[[str], str]


def spelling(names: Iterable[str], model: nn.Module) -> Spelling:
    """How a model spells names: with the prefix put on or taken off, if it has *all* of them then; else as they are.

    Args:
        names: of tensors; names of modules are spelled alike.
    """
    buffers = (name for name, _ in model.named_buffers())
    names, known = list(names), {*model.state_dict(), *buffers}
    for spell in SPELLINGS:
        if known.issuperset(map(spell, names)):
            return spell
    return _as_it_is


def spelling_beside(names: Collection[str], known: Collection[str]) -> Spelling:
    """How names are spelled beside others of the same tower: so that some of both are one; as they are if none ever is."""
    for spell in SPELLINGS:
        if not set(known).isdisjoint(map(spell, names)):
            return spell
    return _as_it_is


def _as_it_is(name: str) -> str:
    return name


def _with_prefix(name: str) -> str:
    return PREFIX + name


def _without_prefix(name: str) -> str:
    return name.removeprefix(PREFIX)


#: every way to spell a name
SPELLINGS: tuple[Spelling, ...] = (_as_it_is, _with_prefix, _without_prefix)


def is_tower(model: nn.Module) -> bool:
    """Whether a model's tensors are a tower's as transformers 4 names them, which a file may spell otherwise."""
    return all(name.startswith(PREFIX) for name in model.state_dict())


@torch.no_grad()
def fill(model: nn.Module, source: TensorSource | None) -> bool:
    """Give a tower the values of a file in the other spelling, of which ``from_pretrained`` found nothing.

    Args:
        source: the file; None where only transformers knows it.

    Returns:
        whether that was so.
    """
    state = model.state_dict()
    if source is None or not is_tower(model):
        return False
    stored = {name: name.removeprefix(PREFIX) for name in state}
    found = set(source.infos())
    if not found.isdisjoint(state) or not found.issuperset(stored.values()):
        return False
    for name, tensor in state.items():
        tensor.copy_(source.read(stored[name]))
    return True
