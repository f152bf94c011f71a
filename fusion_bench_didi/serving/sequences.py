"""Layers that run along a side of what they are given, recurrent ones and attention, where samples must not lie.

torch makes them for samples in the second side unless told otherwise. A model may turn its tensors for that by itself, so that
only what such a layer is given tells.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiDiError

#: Arguments that are sequences, of layers that run along them.
_SEQUENCES = {nn.RNNBase: ("input",), nn.MultiheadAttention: ("query", "key", "value")}

#: lengths of the sequences of every call, by the name of the layer
Lengths = Mapping[str, list[list[int]]]


@contextmanager
def sequence_lengths(model: nn.Module) -> Iterator[Lengths]:
    """Yields a dictionary that fills with the lengths of what this thread gives to such layers of a model."""
    found: dict[str, list[list[int]]] = {}
    thread = threading.get_ident()

    @torch.compiler.disable
    def see(name: str, keys: tuple[str, ...], module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:  # fmt: skip
        given = {**dict(zip(keys, args)), **kwargs}
        held = [x for key in keys if isinstance(x := given.get(key), Tensor)]
        if threading.get_ident() == thread:
            found.setdefault(name, []).append([_length(module, x) for x in held])

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            for kind, keys in _SEQUENCES.items():
                if isinstance(module, kind):
                    hook = partial(see, name, keys)
                    hooks.enter_context(
                        module.register_forward_pre_hook(hook, with_kwargs=True)
                    )
        yield found


def _length(module: nn.Module, x: Tensor) -> int:
    """0 for nested tensors, which keep samples apart."""
    if x.is_nested:
        return 0
    return x.shape[1 if x.ndim > 2 and module.batch_first else 0]


def check_lengths(model: nn.Module, two: Lengths, three: Lengths) -> None:
    """No sequence may grow with the number of samples.

    Args:
        two, three: lengths in runs of two and of three samples.

    Raises:
        DiDiError: naming the layer where one does: its results are of all samples together.
    """
    for name, calls in two.items():
        pairs = zip(calls, three.get(name, ()))
        if len(calls) == len(three.get(name, ())) and any(
            3 * a == 2 * b for few, more in pairs for a, b in zip(few, more) if a
        ):
            layer = model.get_submodule(name)
            raise DiDiError(
                f"{name or 'The model'} ({type(layer).__name__}, batch_first={layer.batch_first}) runs along the first dimension of "
                "the batch, which holds the samples of a mixed one, so that each would be made of all. Let it take sequences with the "
                "samples in front (batch_first=True), or run each task by itself with set_task(...)."
            )
