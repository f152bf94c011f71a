"""Second networks over the tensors of a backbone: trees of modules that share its parameters, hooks and configurations.

Their buffers are their own, so that what a forward writes never reaches the backbone.
"""

import inspect
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..task_vectors.ties import memory_of, tensor_of
from .copies import rebind

#: what is done to the copy of a module
Change = Callable[[nn.Module], None]


def shallow(module: nn.Module) -> nn.Module:
    """A module over the same attributes, as ``copy.copy`` makes it, which parametrized modules refuse."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


def shadowed(module: nn.Module, changes: Mapping[nn.Module, Change]) -> nn.Module:
    """A copy that shares parameters, hooks and configurations; copies of the modules in ``changes`` are changed."""
    made: dict[nn.Module, nn.Module] = {}
    buffers: dict[int, Tensor] = {}

    def own(buffer: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        return buffers.setdefault(id(buffer), buffer.detach().clone())

    def twin_of(module: nn.Module) -> nn.Module:
        if module not in made:
            twin = made[module] = shallow(module)
            children = module._modules.items()
            # what torch.compile wraps a module in would set these on that
            vars(twin).update(
                _modules={n: None if c is None else twin_of(c) for n, c in children},
                _parameters=dict(module._parameters),
                _buffers={name: own(b) for name, b in module._buffers.items()},
            )
        return made[module]

    network = twin_of(module)
    pairs = {id(original): (original, twin) for original, twin in made.items()}
    rebind(network.modules(), pairs, hooks=False)
    for original, change in changes.items():
        change(made[original])
    return network


def network_with(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The backbone with other parameters: ``functional_call`` without its cost per call.

    Args:
        tensors: by parameter name.
    """
    slots = slots_of(backbone, tensors)
    by_module: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for name, tensor in tensors.items():
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, leaf in slots[name]:
            by_module.setdefault(module, {})[leaf] = parameter

    def change(leaves: dict[str, nn.Parameter], twin: nn.Module) -> None:
        twin._parameters.update(leaves)

    return shadowed(backbone, {m: partial(change, own) for m, own in by_module.items()})


#: where transformers 5 has its hooks on states and attentions, and how it notes on a model that it registered them
_CAPTURING, _NOTE = (
    "transformers.utils.output_capturing",
    "_output_capturing_hooks_installed",
)


def watch_states(module: nn.Module) -> None:
    """Have transformers 5 register its hooks on hidden states and attentions, if it has not yet.

    It does so at the first forward that is asked for them, and notes on the model that it did. Networks that share hooks but not
    that note would register them once more each, and give every state several times.
    """
    register = getattr(
        sys.modules.get(_CAPTURING), "maybe_install_capturing_hooks", None
    )
    if register is None:  # transformers 4
        return
    for model in module.modules():
        if hasattr(model, "_can_record_outputs"):
            if not any(_NOTE in vars(inner) for inner in model.modules()):
                register(model)


def unwatched(module: nn.Module) -> nn.Module:
    """The model itself without those hooks, so that it can be pickled; transformers registers them again where it is asked."""
    for inner in module.modules():
        vars(inner).pop(_NOTE, None)
        for key in _capturing(inner):
            del inner._forward_hooks[key]
    return module


def let_pickle(module: nn.Module) -> None:
    """Put hooks that can be pickled in the place of those, which cannot, while they stay registered."""
    for inner in module.modules():
        for key, hook in _capturing(inner).items():
            if not isinstance(hook, CapturingHook):
                names = ("key", "index", "capture_initial_hidden_state")
                held = inspect.getclosurevars(hook).nonlocals
                inner._forward_hooks[key] = CapturingHook(*(held[n] for n in names))


def _capturing(module: nn.Module) -> dict[int, Callable]:
    return {
        key: hook
        for key, hook in module._forward_hooks.items()
        if isinstance(hook, CapturingHook)
        or getattr(hook, "__module__", None) == _CAPTURING
    }


class CapturingHook:
    """A hook of transformers 5 on a layer, which is a function inside of another there; made anew where it is unpickled.

    Args:
        given: to what makes the hook.
    """

    def __init__(self, *given: Any):
        self.given, holder = given, nn.Module()
        from transformers.utils.output_capturing import install_output_capuring_hook

        install_output_capuring_hook(holder, *given)
        (self.hook,) = holder._forward_hooks.values()

    def __reduce__(self) -> tuple:
        return CapturingHook, self.given

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.hook(module, args, output)


#: a module, and the name in it of one of its tensors
Slot = tuple[nn.Module, str]


def slots_of(backbone: nn.Module, names: Iterable[str]) -> dict[str, list[Slot]]:
    """All places of each tensor; tied ones have several."""
    where: dict[Hashable, list[Slot]] = {}
    for module in backbone.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                where.setdefault(memory_of(tensor), []).append((module, leaf))
    return {name: where[memory_of(tensor_of(backbone, name))] for name in names}


class OwnBuffers:
    """The buffers of a second network, put back as they were where a forward wrote to them.

    Args:
        network: from :func:`shadowed`.
        backbone: whose buffers it has copies of.
    """

    def __init__(self, network: nn.Module, backbone: nn.Module):
        pairs = zip(network.modules(), backbone.modules(), strict=True)
        self._kept = [
            (twin._buffers, leaf, original._buffers)
            for twin, original in pairs
            for leaf, buffer in twin._buffers.items()
            if buffer is not None
        ]
        self._versions = [own[leaf]._version for own, leaf, _ in self._kept]

    def restore(self) -> None:
        """A buffer that was registered anew stays: the module knows that it did so."""
        for i, (own, leaf, original) in enumerate(self._kept):
            buffer = own[leaf]
            if buffer._version != self._versions[i]:
                with torch.inference_mode(False):
                    own[leaf] = original[leaf].detach().clone()
                self._versions[i] = own[leaf]._version
