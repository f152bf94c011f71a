"""Layers that are given one input, multiplied in one product: a third of the calls for queries, keys and values."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .mixing import Mix
from .tables import MatrixTable, ValueTable, side_by_side

if TYPE_CHECKING:
    from .per_sample import Product

#: names of neighbours that most architectures give one input; where one does not, results are the same, only slower
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
)


class Joint:
    """The product of several layers; the first layer that is given an input multiplies for all.

    An input is known again by being the same tensor: a model that changes it in place between two layers is found out when
    the first batch is compared with single tasks.

    Args:
        table: (n, m) with the columns of all layers.
        biases: of all layers.
        widths: columns per layer.
    """

    def __init__(
        self, table: MatrixTable, biases: ValueTable | None, widths: Sequence[int]
    ):
        self.table, self.biases, self.widths = table, biases, list(widths)
        self._forget()

    def part(self, place: int, x: Tensor, mix: Mix) -> Tensor:
        """The output of one of the layers."""
        if x is not self.x or mix is not self.mix or self.parts[place] is None:
            y = mix.product(x, self.table, self.biases)
            self.x, self.mix, self.parts = x, mix, [*y.split(self.widths, -1)]
        part, self.parts[place] = self.parts[place], None
        if all(other is None for other in self.parts):
            self._forget()
        return part

    def _forget(self) -> None:
        self.x = self.mix = self.parts = None


def join(network: nn.Module) -> None:
    """Let neighbours of a per-sample network that every task has matrices for multiply together."""
    for module in network.modules():
        for names in TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            if all(map(_joinable, layers)) and len({_kind(l) for l in layers}) == 1:
                _join(layers)


def _joinable(layer: nn.Module | None) -> bool:
    if not isinstance(layer, nn.Linear):
        return False
    table = getattr(layer, "tables", {}).get("weight")
    return table is not None and table.held


def _kind(layer: "Product") -> tuple:
    return layer.in_features, layer.biases is None


def _join(layers: Sequence["Product"]) -> None:
    table = side_by_side([layer.tables["weight"] for layer in layers])
    biases = None
    if layers[0].biases is not None:
        biases = ValueTable(torch.cat([layer.biases.values for layer in layers], 1))
    joint = Joint(table, biases, [layer.out_features for layer in layers])
    for place, layer in enumerate(layers):
        layer.joint, layer.place = joint, place
