"""Tensors that a model uses under several names, and taking them apart where tasks need them to differ."""

import copy
import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointMismatchError

log = logging.getLogger(__name__)

_MARK = "tensors_taken_apart"


def memory_of(tensor: Tensor) -> Hashable:
    """Identity of a tensor's memory: tied tensors are one object, or, where a class ties values only, lie in one place alike."""
    try:
        start = tensor.data_ptr()
        somewhere = bool(start and tensor.numel())
    except (AttributeError, RuntimeError):  # no tensor, or one without memory
        somewhere = False
    if not somewhere:
        return id(tensor)
    return start, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def tied_names(module: nn.Module) -> dict[str, str]:
    """Other names of tied tensors -> their first name in the state dict."""
    first: dict[Hashable, str] = {}
    aliases = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        known = first.setdefault(memory_of(tensor), name)
        if known != name:
            aliases[name] = known
    return aliases


def tie(module: nn.Module, aliases: Mapping[str, str]) -> None:
    """Let tied tensors be one object, which copies and moves of a model leave them, as they do not leave them in one place.

    Args:
        aliases: as :func:`tied_names` gives them, of the module or of what it was copied from.
    """
    for name, first in aliases.items():
        (owner, leaf), (other, known) = _place(module, name), _place(module, first)
        for held in ("_parameters", "_buffers"):
            mine, theirs = getattr(owner, held), getattr(other, held)
            if leaf in mine and known in theirs:
                mine[leaf] = theirs[known]


@torch.no_grad()
def separate(module: nn.Module) -> None:
    """Tensors that lie in the memory of others in another layout, as a transpose or a slice does, get memory of their own.

    What is written to one would be in the others. Tied tensors stay tied.
    """
    every = {"remove_duplicate": False}
    named = (*module.named_parameters(**every), *module.named_buffers(**every))
    places: dict[Hashable, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        places.setdefault(memory_of(tensor), []).append((name, tensor))
    # where there is memory
    groups = [tied for memory, tied in places.items() if isinstance(memory, tuple)]
    apart = [groups[n] for n in _inside_earlier([tied[0][1] for tied in groups])]
    with torch.inference_mode(False):
        for tied in apart:
            own = tied[0][1].detach().clone()
            for _, tensor in tied:
                tensor.data = own
    if apart:
        names = ", ".join(tied[0][0] for tied in apart[:4])
        log.warning(
            "Some tensors of %s lie in the memory of others in another layout (%s%s). They get memory of their own, so that a change of "
            "one is not in the others any more; tasks have the values that each had.",
            type(module).__name__,
            names,
            ", ..." if len(apart) > 4 else "",
        )


def _inside_earlier(tensors: Sequence[Tensor]) -> list[int]:
    """Numbers of tensors of which some entry lies where one of a tensor before has one."""
    found = []
    for group in _neighbors(tensors):
        start = min(tensors[number].data_ptr() for number in group)
        end = max(_end(tensors[number]) for number in group)
        taken = torch.zeros(end - start, dtype=torch.bool, device="cpu")
        for number in sorted(group):
            tensor = tensors[number]
            size = tensor.element_size()
            sides = [(n, s * size) for n, s in zip(tensor.shape, tensor.stride()) if s]
            shape, steps = zip(*sides, (size, 1))  # of bytes
            own = taken.as_strided(shape, steps, tensor.data_ptr() - start)
            if own.any():
                found.append(number)
            else:
                own.fill_(True)
    return sorted(found)


def _neighbors(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Numbers of tensors of which each begins before another one ends."""
    group, device, end = [], None, 0
    places = ((str(t.device), t.data_ptr(), n) for n, t in enumerate(tensors))
    for *_, number in sorted(places):
        tensor = tensors[number]
        if tensor.device != device or tensor.data_ptr() >= end:
            if len(group) > 1:
                yield group
            group, device, end = [], tensor.device, 0
        group.append(number)
        end = max(end, _end(tensor))
    if len(group) > 1:
        yield group


def _end(tensor: Tensor) -> int:
    """The address behind its last entry."""
    last = sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer."""
    owner, leaf = _place(module, name)
    return getattr(owner, leaf)


def tied_by_peft(module: nn.Module) -> bool:
    """Whether PEFT takes a model for one whose embeddings are tied."""
    config = getattr(module, "config", None)
    tied = getattr(config, "tie_word_embeddings", None) is not False
    return tied and bool(getattr(module, "_tied_weights_keys", None))


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
    settings = _configurations(module)
    # a flag that is off already stays as it is
    flags = [bool(getattr(part, "tie_word_embeddings", True)) for part in settings]
    off = settings and not any(flags)
    if not off and _mentions(type(module).forward, "tie_word_embeddings"):
        raise CheckpointMismatchError(
            f"The fine-tuned models need {', '.join(names)} apart from the tensors to which {type(module).__name__} ties them, and "
            "its forward computes something else then. Leave these models out, or train them with tied tensors."
        )
    for name in names:
        _lead_alone(module, name)
        owner, leaf = _place(module, name)
        value = getattr(owner, leaf)
        own = value.detach().clone()
        if isinstance(value, nn.Parameter):
            own = nn.Parameter(own, value.requires_grad)
        setattr(owner, leaf, own)
    for part in settings:
        part.tie_word_embeddings = False
    setattr(module, _MARK, sorted({*taken_apart(module), *names}))


def _lead_alone(module: nn.Module, name: str) -> None:
    """Copy the modules on the way to a tensor that are also others of the model: T5's encoder has its embedding itself, and not just
    the weight."""
    owner = module
    for part in name.split(".")[:-1]:
        child = getattr(owner, part)
        found = module.named_modules(remove_duplicate=False)
        if sum(other is child for _, other in found) > 1:
            child = copy.copy(child)
            for held in ("_parameters", "_buffers", "_modules"):
                setattr(child, held, getattr(child, held).copy())
            setattr(owner, part, child)
        owner = child


def _configurations(module: nn.Module) -> list[Any]:
    """Those that say whether a model's embeddings are tied."""
    config = getattr(module, "config", None)
    found = (config, getattr(config, "get_text_config", lambda: None)())
    return [part for part in found if part is not None]


def _mentions(function: Callable, name: str) -> bool:
    """Whether a name stands in a function; one without source, as of an interactive session, is asked what it was compiled to."""
    try:
        return name in inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(inspect.unwrap(function), "__code__", None)
        return code is not None and name in (*code.co_names, *code.co_consts)


def taken_apart(module: nn.Module) -> list[str]:
    """Names that :func:`untie` was called with."""
    return list(getattr(module, _MARK, ()))
