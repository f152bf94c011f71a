"""Checksums that tell tensors by their values, however they are stored."""

import hashlib
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

#: Values that are converted at a time.
_BLOCK = 2**20


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of shape and values by name: two backbones that differ in any value differ here, however they are stored."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(_digest, tensors.values())))


def state_bytes(value: Any) -> bytes:
    """What is equal for equal values that a module keeps beside its tensors: pickles of tensors tell where they lie in memory."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return f"{value.dtype} {_digest(value)}".encode()
    if isinstance(value, Mapping):
        value = sorted((repr(key), state_bytes(one)) for key, one in value.items())
    elif isinstance(value, (list, tuple)):
        value = type(value).__name__, *map(state_bytes, value)
    return pickle.dumps(value)


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    flat = tensor.detach().reshape(-1)
    # what fits float32 counts as float32, so that the same values in a smaller type are the same
    small = flat.is_floating_point() and flat.element_size() < 4
    for block in flat.split(_BLOCK):
        block = block.cpu().float() if small else block.cpu()
        digest.update(block.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
