"""Checkpoints in float8, with scales beside the weights or without, read as the numbers that they stand for."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointMismatchError
from .file_sources import E8M0
from .quantized import SCALED, quantization
from .sources import TensorInfo, TensorSource, WrappedSource

FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    *((E8M0,) if E8M0 else ()),
)
#: Endings of the names of a weight's scales, which it is multiplied with; those of layer inputs are of no weight.
SCALES = ("_scale_inv", "_scale")
INPUT_SCALES = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")


class Float8Source(WrappedSource):
    """A source some of whose tensors are float8: ``value * scale``, one scale for all, per row, or per block.

    The numbers are told to be of bfloat16, the type in which such a model is run. Without any scale they are read as they are,
    unless the configuration says that they have some.

    Args:
        config: of the model, a file's content or an object; its ``quantization_config`` says the sides of blocks.

    Raises:
        CheckpointMismatchError: if the scales of a weight do not fit it, do not tell their blocks, or are no numbers.
    """

    def __init__(self, source: TensorSource, config: Any = None):
        infos = dict(source.infos())
        super().__init__(source, infos)
        told = quantization(config)
        sides = _told_sides(told, source.label)
        self._scales: dict[str, str] = {}
        self._blocks: dict[str, tuple[int, ...]] = {}
        unused = dict(source.unused)
        for name, info in source.infos().items():
            if info.dtype not in FLOAT8:
                continue
            infos[name] = TensorInfo(info.shape, torch.bfloat16)
            for ending in SCALES:
                if name + ending in infos:
                    self._scales[name] = name + ending
                    self._blocks[name] = _checked(source, name, name + ending, sides)
        for scale in self._scales.values():
            del infos[scale]
            unused[scale] = "multiplied into its weight"
        for name in [n for n in infos if n.endswith(INPUT_SCALES)]:
            del infos[name]
            unused[name] = "of layer inputs in float8"
        self.unused = unused
        self.faults = {**source.faults, **self._without_scale(told)}

    @classmethod
    def over(cls, source: TensorSource, config: Any = None) -> TensorSource:
        """The source, wrapped where it holds float8.

        Args:
            config: of the model, as for the class.
        """
        types = {info.dtype for info in source.infos().values()}
        return cls(source, config) if types & set(FLOAT8) else source

    def _without_scale(self, told: Mapping[str, Any]) -> dict[str, str]:
        """Matrices in float8 that lack a scale, where the configuration or other matrices say that they have one."""
        stored = self._source.infos()
        weights = [
            name
            for name in self._infos
            if stored[name].dtype in FLOAT8
            and stored[name].dtype is not E8M0
            and len(stored[name].shape) > 1
        ]
        scaled = [name for name in weights if name in self._scales]
        if (method := told.get("quant_method")) in SCALED:
            why = f"the configuration says quantization_config.quant_method={method}"
        elif scaled:
            why = f"{scaled[0]} has one"
        else:
            return {}
        fault = (
            f"is float8 without a scale ({' or '.join('...' + end for end in SCALES)}), and {why}: download the model again, or save it "
            "in bfloat16"
        )
        return dict.fromkeys((n for n in weights if n not in self._scales), fault)

    def read(self, name: str) -> Tensor:
        value = self._source.read(name)
        if value.dtype not in FLOAT8:
            return value
        if name not in self._scales:
            return value.to(torch.bfloat16)  # exact
        scale = self._source.read(self._scales[name]).float()
        return value.float() * _spread(scale, value.shape, self._blocks[name])


def _told_sides(told: Mapping[str, Any], label: str) -> tuple[int, int] | None:
    """Rows and columns of the blocks of matrices; None where the configuration does not say."""
    found = told.get("weight_block_size")
    if found is None:
        return None
    listed = isinstance(found, Iterable) and not isinstance(found, str)
    sides = tuple(found) if listed else ()
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise CheckpointMismatchError(
            f"{label}: the configuration says quantization_config.weight_block_size={found!r}, expected rows and columns of a block, "
            "[128, 128] for instance. Mend it, or download it again."
        )
    return sides


def _checked(
    source: TensorSource, name: str, scale: str, told: tuple[int, int] | None
) -> tuple[int, ...]:
    """Sides of the blocks of a weight, each of which has a scale."""
    shape, info = source.infos()[name].shape, source.infos()[scale]
    if not info.floating:
        kind = info.dtype or "a type that torch does not have"
        raise CheckpointMismatchError(
            f"{source.label}: {scale} beside {name} is of {kind}, expected floating point: whole numbers may stand for exponents. "
            "Save the model in bfloat16."
        )
    found = f"{source.label}: {scale} is {info.shape} beside {name} of {shape}"
    if told is not None and len(shape) > 1:
        block = (*(1,) * (len(shape) - 2), *told)
        counts = tuple(-(-side // size) for side, size in zip(shape, block))
        if counts == _counts(shape, info.shape):
            return block
        raise CheckpointMismatchError(
            f"{found}, expected {counts}: the configuration says quantization_config.weight_block_size={[*told]}. Mend the "
            "configuration, or save the model in bfloat16."
        )
    if (block := _block(shape, info.shape)) is None:
        raise CheckpointMismatchError(
            f"{found}, expected one scale, one per row, or one per block whose sides are powers of two and follow from these shapes. "
            "Say rows and columns of a block as quantization_config.weight_block_size in config.json, or save the model in bfloat16."
        )
    return block


def _counts(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """How many scales there are along each side, as far as their shape says."""
    if math.prod(scales) == 1:
        return (1,) * len(shape)
    return (*scales, 1) if len(scales) == 1 and len(shape) == 2 else scales


def _block(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """Sides of the blocks that have a scale of their own; None if there is no such, or one cannot know."""
    counts = _counts(shape, scales)
    if len(counts) != len(shape) or 0 in counts:
        return None
    spans = [_sizes(side, count) for side, count in zip(shape, counts)]
    cut = [span for side, n, span in zip(shape, counts, spans) if n != side]
    low, high = max([low for low, _ in cut] or [1]), min([h for _, h in cut] or [1])
    if low <= high:  # blocks may be square, which says more than each side by itself
        spans = [(low, high)] * len(shape)
    block = []
    for side, count, (low, high) in zip(shape, counts, spans):
        power, even = 1 << (low - 1).bit_length(), side / count
        if count in (1, side):
            block.append(-(-side // count))
        elif power <= high and (even == power or even % 1 or not low <= even <= high):
            block.append(power)
        else:
            return None
    return tuple(block)


def _sizes(side: int, count: int) -> tuple[int, float]:
    """The smallest and the largest blocks of which there are so many along a side; the last one may be cut."""
    largest = (side - 1) // (count - 1) if count > 1 else math.inf
    return -(-side // count), largest


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, ...]) -> Tensor:
    """The scales, one per entry or such that they broadcast."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 and len(shape) == 2:
        scale = scale[:, None]
    for side, size in enumerate(block):
        if scale.shape[side] not in (1, shape[side]):
            scale = scale.repeat_interleave(size, side).narrow(side, 0, shape[side])
    return scale
