"""Tensors that a model uses under several names, and taking them apart where tasks need them to differ."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import CheckpointMismatchError

_MARK = "tensors_taken_apart"


def tied_names(module: nn.Module) -> dict[str, str]:
    """Other names of tied tensors -> their first name in the state dict."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
    return aliases


@torch.no_grad()
def untie(module: nn.Module, names: Iterable[str]) -> None:
    """Give tensors that are tied to others values of their own, equal to what they were.

    Args:
        names: such as ``lm_head.weight``.

    Raises:
        CheckpointMismatchError: if the model computes something else with tied tensors than with others.
    """
    names = sorted(set(names))
    if not names:
        return
    if "tie_word_embeddings" in inspect.getsource(type(module).forward):
        raise CheckpointMismatchError(
            f"The fine-tuned models need {', '.join(names)} apart from the tensors to which {type(module).__name__} ties them, and "
            "its forward computes something else then. Leave these models out, or train them with tied tensors."
        )
    for name in names:
        owner, _, leaf = name.rpartition(".")
        owner, value = module.get_submodule(owner), module.get_parameter(name)
        setattr(owner, leaf, nn.Parameter(value.clone(), value.requires_grad))
    config = getattr(module, "config", None)
    for part in (config, getattr(config, "get_text_config", lambda: None)()):
        if part is not None:
            part.tie_word_embeddings = False
    setattr(module, _MARK, sorted({*taken_apart(module), *names}))


def taken_apart(module: nn.Module) -> list[str]:
    """Names that :func:`untie` was called with."""
    return list(getattr(module, _MARK, ()))
