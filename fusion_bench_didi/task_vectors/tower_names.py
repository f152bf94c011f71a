"""Names of a CLIP tower's tensors: transformers 4 writes ``vision_model.`` in front of each, transformers 5 does not.

transformers 5 reads both. transformers 4 reads its own only, and leaves a tower from a file without the prefix at random
values, with a warning; :func:`fill` makes up for that. What is ours is read in either spelling.
"""

from collections.abc import Iterable

import torch
from torch import nn

from .sources import TensorSource

PREFIX = "vision_model."


def respelled(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Names respelled as those known: with the prefix put on or taken off, if *all* of them are known then.

    Returns:
        known name by name; the names themselves where that is not so.
    """
    names, known = list(names), set(known)
    as_they_are = {name: name for name in names}
    added = {name: PREFIX + name for name in names}
    dropped = {name: name.removeprefix(PREFIX) for name in names}
    for spelling in (as_they_are, added, dropped):
        if known.issuperset(spelling.values()):
            return spelling
    return as_they_are


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
