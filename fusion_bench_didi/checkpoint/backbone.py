"""The base model that a saved model refers to instead of containing it: named, told apart, found again."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointMismatchError, DiDiError


def describe(
    backbone: nn.Module, tensors: Mapping[str, Tensor], known: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry of a saved configuration.

    Args:
        tensors: base values of what the saved model changes.
        known: what the merge knew of the backbone (``source``), see :func:`.pool_reader.backbone_reference`.
    """
    cls = type(backbone)
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "source": None,
        **known,
        "fingerprint": fingerprint(tensors),
    }


def check(
    directory: str | Path, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """The backbone given must be the one of the merge.

    Args:
        entry: from :func:`describe`.
        tensors: as there, of the backbone given.

    Raises:
        CheckpointMismatchError: if it is another one.
    """
    if fingerprint(tensors) != entry["fingerprint"]:
        raise CheckpointMismatchError(
            f"The backbone given is not the one that {directory} was merged from ({entry['class']} from "
            f"{entry['source']}): its weights differ. Pass the base model of the merge."
        )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and up to 256 evenly spaced values per tensor: tells backbones apart at no cost."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].double().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def load_backbone(reference: Mapping[str, Any]) -> nn.Module:
    """The base model that a saved configuration names.

    Raises:
        DiDiError: if the reference tells no place to load it from.
    """
    from fusion_bench.utils import import_object, instantiate

    source = reference["source"]
    if isinstance(source, str):
        return import_object(reference["class"]).from_pretrained(source)
    if isinstance(source, Mapping):
        return instantiate(source)
    raise DiDiError(
        f"The saved model does not say where its backbone ({reference['class']}) lies: it was merged from modules in "
        "memory. Pass backbone=<the base model> to from_pretrained."
    )
