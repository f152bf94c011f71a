"""A task's own tensor without any loss, as the difference of its bits from the base model's."""

import zlib

import torch
from torch import Tensor

from ..errors import CheckpointMismatchError
from .plain import OwnDelta

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class LosslessDelta(OwnDelta):
    """Floating-point numbers as whole numbers in their order, less those of the base model, compressed.

    Close numbers are close whole numbers, so that a small change leaves the high bytes of the difference alike. The
    lowest bytes of all entries come first, then the next, and zlib packs them.

    Args:
        stream: (size,) uint8.
        like: (0,) of the type of the tensor.
    """

    kind = "lossless"
    parts = ("stream", "like")

    @classmethod
    def of(cls, value: Tensor, base: Tensor) -> "LosslessDelta":
        """The delta between a task's tensor and the base model's, of one floating type and shape."""
        difference = _ordered(value.cpu()) - _ordered(base.cpu())
        sign = difference >> (8 * value.element_size() - 1)
        folded = (difference << 1) ^ sign  # 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
        planes = folded.flatten()[:, None].view(torch.uint8).mT.contiguous()
        packed = zlib.compress(planes.numpy().tobytes(), 6)
        stream = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        return cls(tuple(value.shape), stream, value.new_empty(0).cpu())

    def applied(self, base: Tensor, shared=None) -> Tensor:
        size, like = self.like.element_size(), self.like.dtype
        planes = _unpacked(self.stream, size * self.numel).view(size, -1)
        # flat first: of a single entry the bytes may lie anyhow
        folded = planes.mT.reshape(-1).view(_INTEGERS[size]).view(self.shape)
        # a shift that brings zeros in
        most = (1 << (8 * size - 1)) - 1
        difference = ((folded >> 1) & most) ^ -(folded & 1)
        ordered = difference.to(base.device) + _ordered(base.to(like))
        return _unordered(ordered).view(like)


def _ordered(value: Tensor) -> Tensor:
    """Whole numbers of the same width whose order is that of the values."""
    size = value.element_size()
    return _unordered(value.contiguous().view(_INTEGERS[size]))


def _unordered(bits: Tensor) -> Tensor:
    """Its own inverse: negative numbers have all bits but the sign's turned over."""
    most = (1 << (8 * bits.element_size() - 1)) - 1
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & most)


def _unpacked(stream: Tensor, size: int) -> Tensor:
    """Decode the bytes of the difference, (size,) uint8.

    Raises:
        CheckpointMismatchError: if the stream holds something else.
    """
    reader = zlib.decompressobj()
    try:
        found = reader.decompress(stream.cpu().numpy().tobytes(), size + 1)
    except zlib.error as error:
        raise CheckpointMismatchError(
            f"A compressed tensor cannot be read: {error}. Write the model again."
        ) from error
    if len(found) != size or not reader.eof:
        raise CheckpointMismatchError(
            f"A compressed tensor is not of {size} bytes. Write the model again."
        )
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)
