"""Checkpoints in float8, with scales beside the weights or without, read as the numbers that they stand for."""

import torch
from torch import Tensor

from ..errors import CheckpointMismatchError
from .file_sources import E8M0
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

    The numbers are told to be of bfloat16, the type in which such a model is run.

    Raises:
        CheckpointMismatchError: if the scales of a weight do not fit it, or are no numbers.
    """

    def __init__(self, source: TensorSource):
        infos = dict(source.infos())
        super().__init__(source, infos)
        self._scales: dict[str, str] = {}
        unused = dict(source.unused)
        for name, info in source.infos().items():
            if info.dtype not in FLOAT8:
                continue
            infos[name] = TensorInfo(info.shape, torch.bfloat16)
            for ending in SCALES:
                if name + ending in infos:
                    self._scales[name] = name + ending
                    _check(source, name, name + ending)
        for scale in self._scales.values():
            del infos[scale]
            unused[scale] = "multiplied into its weight"
        for name in [n for n in infos if n.endswith(INPUT_SCALES)]:
            del infos[name]
            unused[name] = "of layer inputs in float8"
        self.unused = unused

    @classmethod
    def over(cls, source: TensorSource) -> TensorSource:
        """The source, wrapped where it holds float8."""
        types = {info.dtype for info in source.infos().values()}
        return cls(source) if types & set(FLOAT8) else source

    def read(self, name: str) -> Tensor:
        value = self._source.read(name)
        if value.dtype not in FLOAT8:
            return value
        if name not in self._scales:
            return value.to(torch.bfloat16)  # exact
        scale = self._source.read(self._scales[name]).float()
        return value.float() * _spread(scale, value.shape)


def _check(source: TensorSource, name: str, scale: str) -> None:
    shape, info = source.infos()[name].shape, source.infos()[scale]
    if not info.floating:
        kind = info.dtype or "a type that torch does not have"
        raise CheckpointMismatchError(
            f"{source.label}: {scale} beside {name} is of {kind}, expected floating point: whole numbers may stand for exponents. "
            "Save the model in bfloat16."
        )
    if _block(shape, info.shape) is None:
        raise CheckpointMismatchError(
            f"{source.label}: {scale} is {info.shape} beside {name} of {shape}, expected one scale, one per row, or one per block. "
            "Save the model in bfloat16."
        )


def _block(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """Sides of the blocks that have a scale of their own; None if there is no such."""
    if all(side == 1 for side in scales):
        return shape
    if len(scales) == 1 and len(shape) == 2:
        scales = (*scales, 1)
    if len(scales) != len(shape):
        return None
    block = tuple(-(-side // count) for side, count in zip(shape, scales))
    # blocks have whole powers of two, the last ones may be cut
    block = tuple(
        size if count in (1, side) else 1 << (size - 1).bit_length()
        for size, side, count in zip(block, shape, scales)
    )
    fits = all(-(-s // b) == n for s, b, n in zip(shape, block, scales))
    return block if fits else None


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """The scales, one per entry or such that they broadcast."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 and len(shape) == 2:
        scale = scale[:, None]
    for side, block in enumerate(_block(tuple(shape), tuple(scale.shape))):
        if scale.shape[side] not in (1, shape[side]):
            scale = scale.repeat_interleave(block, side).narrow(side, 0, shape[side])
    return scale
