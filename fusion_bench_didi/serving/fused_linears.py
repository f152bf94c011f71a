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
        bank: (n, m) with the columns of all layers.
        biases: of all layers.
        widths: columns per layer.
        number: which fused layers of the network these are.
    """

    def __init__(
        self,
        bank: MatrixBank,
        biases: ValueBank | None,
        widths: Sequence[int],
        number: int,
    ):
        self.bank, self.biases, self.widths = bank, biases, list(widths)
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
            if len(layers) > 1 and len({_kind(l) for l in layers}) == 1:
                _fuse(layers, next(numbers))


def _fusable(layer: nn.Module | None) -> bool:
    if not isinstance(layer, nn.Linear):
        return False
    bank = getattr(layer, "banks", {}).get("weight")
    return isinstance(bank, MatrixBank) and bank.held


def _kind(layer: nn.Linear) -> tuple:
    return layer.in_features, layer.biases is None


def _fuse(layers: Sequence[nn.Linear], number: int) -> None:
    bank = side_by_side([layer.banks["weight"] for layer in layers])
    biases = None
    if layers[0].biases is not None:
        biases = ValueBank(torch.cat([layer.biases.values for layer in layers], 1))
    widths = [layer.out_features for layer in layers]
    fused = FusedLinears(bank, biases, widths, number)
    for place, layer in enumerate(layers):
        layer.fused, layer.place = fused, place
