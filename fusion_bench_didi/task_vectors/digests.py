"""Checksums that tell tensors by their values, however they are stored."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

#: Values that are converted at a time.
_BLOCK = 2**20


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of shape and values by name: two backbones that differ in any value differ here, however they are stored."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(_digest, tensors.values())))


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    flat = tensor.detach().reshape(-1)
    # what fits float32 counts as float32, so that the same values in a smaller type are the same
    small = flat.is_floating_point() and flat.element_size() < 4
    for block in flat.split(_BLOCK):
        block = block.cpu().float() if small else block.cpu()
        digest.update(block.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
