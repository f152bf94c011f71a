"""safetensors files with their SHA-256: written as they are, opened only if they are what was written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointMismatchError
from ..files import file_digest
from .fields import inside

MAX_SHARD = "5GB"


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors as they are; nothing is written for none.

    Returns:
        SHA-256 by file name, for :func:`open_tensors`.
    """
    save_torch_state_dict(
        {name: independent(value) for name, value in tensors.items()},
        directory,
        max_shard_size=MAX_SHARD,
    )
    files = sorted(directory.glob("*.safetensors"))
    return {file.name: file_digest(file) for file in files}


def open_tensors(
    directory: Path, files: Mapping[str, str], *, verify: bool = True
) -> dict[str, Any]:
    """Open the files of :func:`write_tensors`: by tensor name the file, whose ``get_tensor(name)`` reads it.

    Raises:
        CheckpointMismatchError: for a missing, truncated or altered file, and for one that is not in the directory.
    """
    where: dict[str, Any] = {}
    for name, digest in files.items():
        path = inside(directory, name)
        if not path.is_file():
            fault = "is no file" if os.path.lexists(path) else "is missing"
            raise CheckpointMismatchError(
                f"{path} {fault}; config.json lists it. Copy the whole directory."
            )
        try:
            handle = safe_open(path, framework="pt")
            keys = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointMismatchError(
                f"{path} is not a whole safetensors file ({error}). Copy or write it again."
            ) from error
        if verify and file_digest(path) != digest:
            raise CheckpointMismatchError(
                f"{path} was altered after it was written: its SHA-256 differs from config.json's. Copy or write it again."
            )
        if twice := sorted(where.keys() & set(keys)):
            raise CheckpointMismatchError(
                f"{path} holds {twice[0]!r}, and so does another file of {directory}. Write the model again."
            )
        where.update(dict.fromkeys(keys, handle))
    return where


def independent(value: Tensor) -> Tensor:
    """On the CPU, contiguous, and no view: a view of a larger tensor would be written with the whole."""
    value = value.detach().contiguous().cpu()
    whole = value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone()
