"""A backbone whose changed layers run every sample under its own weights.

The network is a second set of modules over the same tensors: leaf modules that own changed tensors become a subclass with
another forward. What the batch is mixed by is found in :class:`~.running.Running`.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .banks import MatrixBank, ValueBank
from .fused_linears import FusedLinears
from .making import AnyBank
from .mixtures import Mix, over
from .running import Running
from .stored import Positions


class UnsupportedShape(Exception):
    """An input whose first side is not the batch; says which."""


class PerSample:
    """Attributes of the subclasses below beside those of the module they extend.

    Attributes:
        banks: of the changed tensors, by their name in the module.
        running: shared by the whole network.
    """

    banks: Mapping[str, AnyBank]
    running: Running

    def prepare(self) -> None:
        """Working copies, before the first call."""

    def mix_for(self, x: Tensor) -> Mix:
        """The current mix of as many rows as the input has."""
        mix = None if x.ndim < 2 else self.running.current.mix_of(len(x))
        if mix is None:
            raise UnsupportedShape(f"{type(self).__name__} is given {tuple(x.shape)}")
        return mix


class PerSampleLinear(PerSample):
    """``x W + b``: linear layers, and the (n, m) ones of GPT-2."""

    fused: FusedLinears | None = None
    place = 0

    def prepare(self) -> None:
        self.biases = self.banks.get("bias")
        if self.biases is None and self.bias is not None:
            tasks = self.banks["weight"].tasks
            self.biases = ValueBank(self.bias.expand(tasks + 1, -1))

    def forward(self, x: Tensor) -> Tensor:
        mix = self.mix_for(x)
        if self.fused is not None:
            return self.fused.part(self.place, x, self.running.current)
        if "weight" in self.banks:
            return mix.product(x, self.banks["weight"], self.biases)
        y = super().forward(x)
        return y + over(mix.rows(self.biases) - self.bias, y).to(y)


class PerSamplePatchConv(PerSampleLinear):
    """A convolution whose kernels do not overlap: a linear layer on patches."""

    def forward(self, x: Tensor) -> Tensor:
        mix = self.mix_for(x)
        if "weight" not in self.banks:
            y = nn.Conv2d.forward(self, x)
            return y + (mix.rows(self.biases) - self.bias)[:, :, None, None].to(y)
        rows = patches(x, self.kernel_size)
        y = mix.product(rows, self.banks["weight"], self.biases)
        return y.mT.unflatten(2, (-1, x.shape[3] // self.kernel_size[1]))


class PerSampleLayerNorm(PerSample):
    """Layer norm with scale and bias per sample."""

    def prepare(self) -> None:
        # without weight and bias torch takes a path that is half as fast on a CPU in float32
        self.plain = torch.ones_like(self.weight), torch.zeros_like(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        mix = self.mix_for(x)
        y = F.layer_norm(x, self.normalized_shape, *self.plain, self.eps)
        weight, bias = self.rows("weight", mix, x), self.rows("bias", mix, x)
        return y.mul_(weight) if bias is None else torch.addcmul(bias, y, weight, out=y)

    def rows(self, leaf: str, mix: Mix, x: Tensor) -> Tensor | None:
        if leaf not in self.banks:
            return getattr(self, leaf)
        return over(mix.rows(self.banks[leaf]), x)


class PerSampleRMSNorm(PerSample):
    """A norm that multiplies by its weight alone; the classes of transformers work it out each in their own way."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mix_for(x).rows(self.banks["weight"])
        self.running.current.weight = over(rows, x)
        return super().forward(x)

    @property
    def weight(self) -> Tensor:
        """(B, 1, ..., n), of the forward that asks."""
        return self.running.current.weight


class PerSampleEmbedding(PerSample):
    """An embedding; ids (1, N) are the same for all samples."""

    def prepare(self) -> None:
        bank = self.banks["weight"]
        dense = isinstance(bank, MatrixBank) and bank.dense
        self.values = bank.stacked() if dense else None

    def forward(self, ids: Tensor) -> Tensor:
        size, bank = self.running.current.mix.size, self.banks["weight"]
        if ids.ndim > 1 and len(ids) == 1:
            ids = ids.expand(size, *ids.shape[1:])
        mix = self.mix_for(ids)
        if not isinstance(bank, MatrixBank):
            return mix.stored(Positions(ids, self.weight), bank)
        if self.values is not None:
            return mix.lookup(ids, self.values)
        inner = F.embedding(ids, bank.first)
        own = inner * over(mix.scale(bank.owner).to(inner), inner)
        return F.embedding(ids, bank.shared) + own @ bank.last


@lru_cache(maxsize=None)
def broadcast_form(leaf: str) -> type:
    """A module that sees its parameter once per sample."""

    def rows(self: PerSample) -> Tensor:
        return self.running.current.mix.rows(self.banks[leaf])[:, None]

    return type("Broadcast", (PerSample,), {leaf: property(rows)})


def is_turned(module: nn.Module, leaf: str) -> bool | None:
    """How :func:`~.making.bank_of` lays a tensor out for the module that owns it."""
    if getattr(module, leaf).ndim < 2:
        return None
    return isinstance(module, (nn.Linear, nn.Conv2d))


def patches(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The vectors that a convolution without overlap multiplies, (B, N, c h w) of (B, c, H, W)."""
    rows, columns = (side // step for side, step in zip(x.shape[2:], size))
    x = x[:, :, : rows * size[0], : columns * size[1]]
    x = x.unflatten(3, (columns, size[1])).unflatten(2, (rows, size[0]))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def apart(module: nn.Conv2d) -> bool:
    """Whether the kernels of a convolution do not overlap, as :func:`patches` supposes."""
    return (
        module.kernel_size == module.stride
        and module.padding in (0, (0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
    )
