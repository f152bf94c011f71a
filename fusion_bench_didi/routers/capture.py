"""What goes into, and comes out of, layers of a dynamic model; the forward stops once everything asked for is there."""

import fnmatch
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import DiDiError, SettingsError, some
from ..serving.caches import without_pasts
from ..serving.trees import first_tensor
from ..task_vectors.tower_names import SPELLINGS
from .base import RoutedModel
from .heads import spread_of


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
        inputs_of, outputs_of: module names, no module in both.

    Raises:
        SettingsError: naming a layer that is not called once, for one row per sample.
        DiDiError: for samples that go on from a cache, and those that only some tasks can run, as their vocabularies differ.
    """
    found: dict[str, Tensor] = {}
    wanted = {*inputs_of, *outputs_of}
    here = threading.get_ident()

    def keep(name: str, value: Any) -> None:
        if threading.get_ident() != here:
            return  # another thread runs the same layers
        if name in found:
            raise _not_per_sample(name, "is called more than once")
        found[name] = value = first_tensor(value)
        if value is None or len(value) != call.size:
            seen = "no tensor" if value is None else tuple(value.shape)
            raise _not_per_sample(name, f"sees {seen} of {call.size} samples")
        if len(found) == len(wanted):
            raise _Done

    def before(name: str) -> Callable:
        return lambda _, given: keep(name, given)

    def after(name: str) -> Callable:
        return lambda module, _, out: keep(name, _channels_last(module, out))

    forward = model.mixed_at(shared_scale)
    call = without_pasts(forward.call(args, kwargs))
    mask = call.given.get("attention_mask")
    rows = None if weights is None else weights.expand(call.size, -1)
    mix = forward.mix([None] * call.size if rows is None else None, rows, call)
    if tensors is None:
        forward.verify(mix, call)  # before it is watched
    layer = model.backbone.get_submodule
    handles = [layer(n).register_forward_pre_hook(before(n)) for n in inputs_of]
    handles += [layer(n).register_forward_hook(after(n)) for n in outputs_of]
    try:
        if tensors is not None:
            forward.with_tensors(tensors, call)
        elif weights is None:
            forward.shared(mix, call)
        else:
            forward.run(mix, call, watched=True)
    except _Done:
        return Recorded(found, mask)
    except IndexError as error:
        if not forward.of_several_shapes:
            raise
        raise DiDiError(
            f"A router runs every sample under the weights of other tasks and of none, where some sample does not run ({error}): tasks "
            f"have {some(forward.of_several_shapes)} in several shapes. Give the task_ids of such samples."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    raise SettingsError(
        f"The backbone's forward does not call {sorted(wanted - set(found))}. Give layers that it calls."
    )


def _not_per_sample(name: str, found: str) -> SettingsError:
    return SettingsError(
        f"A router looks at layers that are called once, with one row per sample, as experts, their gates and layers on windows "
        f"of an image are not. {name} {found}. Give the names of other layers: layers=[...]."
    )


def _channels_last(module: nn.Module, output: Any) -> Tensor | None:
    """A layer's first output (B, ..., n); (B, n, H, W) of one that convolves comes as (B, H W, n)."""
    found = first_tensor(output)
    if found is None or found.ndim != 4:
        return found
    convolves = any(isinstance(inner, nn.Conv2d) for inner in module.modules())
    return found.flatten(2).mT if convolves else found


def blocks(backbone: nn.Module) -> list[str]:
    """Names of the modules of the longest ``nn.ModuleList`` that is in no block of another: the blocks of a transformer.

    What a block holds a list of, such as experts, are parts of it.

    Raises:
        SettingsError: if there is none.
    """
    lists = {
        f"{name}.".lstrip("."): module
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_called(module)
    }
    chains = [name for name, module in lists.items() if _is_chain(module)]
    outermost = [
        name
        for name in lists
        if not any(name.startswith(c) and name != c for c in chains)
    ]
    if not outermost:
        raise SettingsError(
            f"{type(backbone).__name__} has no list of blocks; give the names of layers."
        )
    longest = max(outermost, key=lambda name: len(lists[name]))
    return [f"{longest}{i}" for i in range(len(lists[longest]))]


def _is_called(modules: Sequence[nn.Module]) -> bool:
    """Whether what a list holds can be called, as lists cannot."""
    return len(modules) and not any(isinstance(m, nn.ModuleList) for m in modules)


def _is_chain(modules: nn.ModuleList | nn.Sequential) -> bool:
    """Whether what a list holds is alike, as blocks are; a whole model may be a sequence of its parts."""
    return isinstance(modules, nn.ModuleList) or len({*map(type, modules)}) == 1


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
            found_by = (fnmatch.filter(names, spell(layer)) for spell in SPELLINGS)
            matches = next(filter(None, found_by), None)
            if not matches:
                raise SettingsError(
                    f"No layer is called {layer!r}; there are {some(names)}."
                )
            found.extend(matches)
    return list(dict.fromkeys(found))


def token_mask(states: Tensor, mask: Tensor | None) -> Tensor | None:
    """(B, N) of a batch of texts, where states (B, N, n) are of its tokens; None where all count.

    Raises:
        DiDiError: naming samples of which no token counts.
    """
    if mask is None or states.ndim != 3 or mask.shape != states.shape[:2]:
        return None
    mask = mask.bool()
    if empty := (~mask.any(1)).nonzero().flatten().tolist():
        raise DiDiError(
            f"Rows {empty} of attention_mask count no token, so that a router sees nothing of these samples. Leave them out, or "
            "give task_ids."
        )
    return mask


def squarable(states: Tensor) -> Tensor:
    """States in a type that holds their squares and sums, which float16 need not."""
    return states.float() if states.dtype == torch.float16 else states


def pooled(
    states: Tensor, how: Literal["cls", "mean", "both"], mask: Tensor | None = None
) -> Tensor:
    """(B, n) from token states (B, N, n); ``both``: mean and standard deviation over tokens beside the first that counts.

    Args:
        mask: the tokens that count, (B, N).
    """
    states = squarable(states)
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
    if std is None:
        std = spread_of(states, 1)
    return torch.cat([first, mean, std], 1)
