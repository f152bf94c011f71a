"""Layers that are given one input, multiplied in one product: a third of the calls for queries, keys and values."""

from collections.abc import Sequence

from torch import Tensor

from .banks import MatrixBank, ValueBank
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
