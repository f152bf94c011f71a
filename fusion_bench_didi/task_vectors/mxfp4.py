"""Checkpoints in mxfp4, as of GPT-OSS, read as the numbers that transformers decodes them to."""

from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointMismatchError
from .quantized import quantization
from .sources import TensorInfo, TensorSource, WrappedSource

BLOCKS, SCALES = "_blocks", "_scales"
#: What four bits stand for, the highest of which is the sign.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor((*_POSITIVE, *(-v for v in _POSITIVE)), device="cpu")
#: The two values of every byte, its lower four bits first.
_PAIRS = torch.stack((_VALUES.repeat(16), _VALUES.repeat_interleave(16)), dim=1)
#: The exponent that a scale of 0 stands for.
_LOWEST = -127


class Mxfp4Source(WrappedSource):
    """A source some of whose tensors are four-bit numbers with a power of two per 32 of a row: ``value * 2 ** (scale - 127)``.

    ``x_blocks`` (experts, out, in / 32, 16) and ``x_scales`` (experts, out, in / 32), both of bytes, are ``x`` (experts, in, out) in
    bfloat16, which holds such numbers exactly.

    Raises:
        CheckpointMismatchError: if scales do not fit their blocks.
    """

    def __init__(self, source: TensorSource):
        infos = dict(source.infos())
        for blocks in [n for n in infos if n.endswith(BLOCKS)]:
            name = blocks.removesuffix(BLOCKS)
            scales = name + SCALES
            if scales not in infos or name in infos:
                continue
            packed, scale = infos.pop(blocks), infos.pop(scales)
            _check(source.label, blocks, packed, scale)
            experts, rows, groups, half = packed.shape
            shape = (experts, groups * 2 * half, rows)
            infos[name] = TensorInfo(shape, torch.bfloat16)
        super().__init__(source, infos)

    @classmethod
    def over(cls, source: TensorSource, config: Any = None) -> TensorSource:
        """The source, wrapped where the configuration says that it is in mxfp4.

        Args:
            config: of the model, a file's content or an object.
        """
        told = quantization(config).get("quant_method")
        return cls(source) if told == "mxfp4" else source

    def read(self, name: str) -> Tensor:
        if name in self._source.infos():
            return self._source.read(name)
        blocks = self._source.read(name + BLOCKS)
        exponents = self._source.read(name + SCALES).int() + _LOWEST
        value = torch.empty(self._infos[name].shape, dtype=torch.bfloat16)
        for one, codes, exponent in zip(value, blocks, exponents):
            pairs = _PAIRS[codes.int()].flatten(-2)
            one.copy_(torch.ldexp(pairs, exponent[..., None]).flatten(1).T)
        return value


def _check(label: str, name: str, packed: TensorInfo, scale: TensorInfo) -> None:
    whole = packed.dtype == scale.dtype == torch.uint8
    if not whole or len(packed.shape) != 4 or scale.shape != packed.shape[:-1]:
        raise CheckpointMismatchError(
            f"{label}: {name} is {packed.shape} of {packed.dtype}, its scales {scale.shape} of {scale.dtype}, expected bytes, 16 of which "
            "have one scale. Download the model again."
        )
