"""Layers that are given one input, multiplied in one product: a third of the calls for queries, keys and values."""

from collections.abc import Sequence

from torch import Tensor

from .banks import MatrixBank, ValueBank
from .mixtures import Mix


class FusedLinears:
    """The product of several layers; the first layer that is given an input multiplies for all.

    An input is known again by being the same tensor: a model that changes it in place between two layers is found out when
    the first batch is compared with single tasks.

    Args:
        table: (n, m) with the columns of all layers.
        biases: of all layers.
        widths: columns per layer.
    """

    def __init__(
        self, table: MatrixBank, biases: ValueBank | None, widths: Sequence[int]
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
