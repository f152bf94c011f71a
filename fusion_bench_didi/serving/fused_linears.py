"""Layers that are given one input, multiplied in one product: a third of the calls for queries, keys and values."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .banks import MatrixBank, ValueBank, side_by_side
from .running import Pass


class FusedLinears:
    """The product of several layers; the first layer that is given an input multiplies for all.

    An input is known again by being the same tensor: a model that changes it in place between two layers is found out when
    the first batch is compared with single tasks.

    Args:
        layers: with or without biases, all alike; their banks become parts of one.
        number: which fused layers of the network these are.
    """

    def __init__(self, layers: Sequence[nn.Linear], number: int):
        self.bank = side_by_side([layer.banks["weight"] for layer in layers])
        self.biases: ValueBank | None = None
        if layers[0].biases is not None:
            biases = [layer.biases.values for layer in layers]
            self.biases = ValueBank(torch.cat(biases, 1))
        self.widths = [layer.out_features for layer in layers]
        self.number = number

    def part(self, place: int, x: Tensor, current: Pass) -> Tensor:
        """The output of one of the layers in a pass."""
        seen, parts = current.fused.get(self.number, (None, []))
        if x is not seen or parts[place] is None:
            y = current.mix_of(len(x)).product(x, self.bank, self.biases)
            parts = [*y.split(self.widths, -1)]
            current.fused[self.number] = x, parts
        part, parts[place] = parts[place], None
        if all(other is None for other in parts):
            del current.fused[self.number]
        return part


#: names of neighbors that most architectures give one input; where one does not, results are the same, only slower
FUSABLE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
)


def fuse(network: nn.Module) -> None:
    """Let neighbors of a per-sample network that every task has matrices for multiply together; others stay by themselves."""
    numbers = itertools.count()
    for module in network.modules():
        for names in FUSABLE:
            layers = [getattr(module, name, None) for name in names]
            layers = [layer for layer in layers if _fusable(layer)]
            kinds = {(layer.in_features, layer.biases is None) for layer in layers}
            if len(layers) > 1 and len(kinds) == 1:
                fused = FusedLinears(layers, next(numbers))
                for place, layer in enumerate(layers):
                    layer.fused, layer.place = fused, place


def _fusable(layer: nn.Module | None) -> bool:
    if not isinstance(layer, nn.Linear):
        return False
    bank = getattr(layer, "banks", {}).get("weight")
    return isinstance(bank, MatrixBank) and bank.held
