"""What goes into, and comes out of, layers of a dynamic model; the forward stops once everything asked for is there."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import SettingsError, some
from ..task_vectors.tower_names import SPELLINGS
from .base import RoutedModel


class _Done(Exception):
    """Everything asked for was seen."""


@dataclass(frozen=True)
class Recorded:
    """What layers were given, or returned, in one forward.

    Args:
        states: first tensor given or returned, by module name; of feature maps the channels are last.
        mask: of the tokens of the batch, as the forward was given it.
    """

    states: Mapping[str, Tensor]
    mask: Tensor | None


@torch.no_grad()
def record(
    model: RoutedModel,
    args: tuple,
    kwargs: dict,
    *,
    weights: Tensor | None = None,
    shared_scale: float = 1.0,
    tensors: Mapping[str, Tensor] | None = None,
    inputs_of: Sequence[str] = (),
    outputs_of: Sequence[str] = (),
) -> Recorded:
    """Inputs and outputs of layers when all samples run under the same weights.

    Args:
        weights: (T,) for all samples; None for the shared model.
        shared_scale: factor on the shared part.
        tensors: run the backbone with these in place of its own instead.
        inputs_of, outputs_of: module names; a module in both appears with its output.
    """
    found: dict[str, Tensor] = {}
    wanted = len(set(inputs_of) | set(outputs_of))
    here = threading.get_ident()

    def keep(name: str, value: Any) -> None:
        if threading.get_ident() != here:
            return  # another thread runs the same layers
        found[name] = value if isinstance(value, Tensor) else value[0]
        if len(found) == wanted:
            raise _Done

    forward = model.mixed_at(shared_scale)
    call = forward.call(args, kwargs)
    mask = call.given.get("attention_mask")
    rows = None if weights is None else weights.expand(call.size, -1)
    mix = forward.mix([None] * call.size if rows is None else None, rows, call)
    if tensors is None:
        forward.verify(mix, call)  # before it is watched
    handles = []
    for name in inputs_of:
        module = model.backbone.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(lambda _, a, n=name: keep(n, a[0]))
        )
    for name in outputs_of:
        module = model.backbone.get_submodule(name)
        handles.append(
            module.register_forward_hook(
                lambda m, a, out, n=name: keep(n, _channels_last(m, out))
            )
        )
    try:
        if tensors is not None:
            forward.with_tensors(tensors, call)
        elif weights is None:
            forward.shared(*args, **kwargs)
        else:
            forward.run(mix, call, watched=True)
    except _Done:
        return Recorded(found, mask)
    finally:
        for handle in handles:
            handle.remove()
    missing = (set(inputs_of) | set(outputs_of)) - set(found)
    raise SettingsError(
        f"The backbone's forward does not call {sorted(missing)}. Give layers that it calls."
    )


def _channels_last(module: nn.Module, output: Any) -> Tensor:
    """A layer's first output (B, ..., n); (B, n, H, W) of one that convolves comes as (B, H W, n)."""
    found = output if isinstance(output, Tensor) else output[0]
    convolves = any(isinstance(inner, nn.Conv2d) for inner in module.modules())
    return found.flatten(2).mT if found.ndim == 4 and convolves else found


def blocks(backbone: nn.Module) -> list[str]:
    """Names of the modules of the longest ``nn.ModuleList``: the blocks of a transformer.

    Raises:
        SettingsError: if there is none.
    """
    lists = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    ]
    if not lists:
        raise SettingsError(
            f"{type(backbone).__name__} has no list of blocks; give the names of layers."
        )
    name, longest = max(lists, key=lambda pair: len(pair[1]))
    return [f"{name}.{i}" if name else str(i) for i in range(len(longest))]


def layer_names(backbone: nn.Module, layers: Sequence[int | str]) -> list[str]:
    """Module names from positions among the :func:`blocks`, names, or patterns of names, of a tower in either spelling.

    Raises:
        SettingsError: for one that matches nothing.
    """
    if not layers:
        raise SettingsError(
            "layers names none. Give blocks by position, or names of modules."
        )
    names = [name for name, _ in backbone.named_modules()]
    found: list[str] = []
    for layer in layers:
        if isinstance(layer, int):
            chain = blocks(backbone)
            if not -len(chain) <= layer < len(chain):
                raise SettingsError(
                    f"There is no block {layer}; there are {len(chain)}, counted from 0."
                )
            found.append(chain[layer])
        else:
            patterns = (spell(layer) for spell in SPELLINGS)
            found_by = ([n for n in names if fnmatch(n, p)] for p in patterns)
            matches = next(filter(None, found_by), None)
            if not matches:
                raise SettingsError(
                    f"No layer is called {layer!r}; there are {some(names)}."
                )
            found.extend(matches)
    return list(dict.fromkeys(found))


def token_mask(states: Tensor, mask: Tensor | None) -> Tensor | None:
    """(B, N) of a batch of texts, where states (B, N, n) are of its tokens; None where all count."""
    if mask is None or states.ndim != 3 or mask.shape != states.shape[:2]:
        return None
    return mask.bool()


def pooled(
    states: Tensor, how: Literal["cls", "mean", "both"], mask: Tensor | None = None
) -> Tensor:
    """(B, n) from token states (B, N, n); ``both``: mean and standard deviation over tokens beside the first that counts.

    Args:
        mask: the tokens that count, (B, N).
    """
    if states.ndim == 2:
        return states
    mask = token_mask(states, mask)
    states = states.flatten(1, -2)
    first = states[:, 0]
    if mask is not None:  # prompts are padded on the left
        first = states[torch.arange(len(states)), mask.int().argmax(1)]
    if how == "cls":
        return first
    mean, std = states.mean(1), None
    if mask is not None:
        weights = mask[..., None].to(states)
        count = weights.sum(1)
        mean = (states * weights).sum(1) / count
        spread = ((states - mean[:, None]).square() * weights).sum(1)
        std = (spread / (count - 1).clamp_min(1)).sqrt()
    if how == "mean":
        return mean
    std = states.std(1) if std is None else std
    return torch.cat([first, mean, std], 1)
