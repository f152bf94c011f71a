"""The forms in which models that are not our own are written: whole tensors, per task or once, and the host's mixtures.

Writers take the directory, what is to be written, the base model's tensors, and the data type of each tensor that some
task changed; they return what the reader of the same kind needs beside the files, JSON-plain.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.tensors import open_tensors, write_tensors
from ..errors import CheckpointMismatchError
from ..task_vectors.sources import ModuleSource
from .host_moe import HostParts, put_together

BACKBONE, EXPERTS = "backbone", "experts"
Types = Mapping[str, torch.dtype]


def write_static(
    place: Path, model: nn.Module, base: Mapping[str, Tensor], types: Types
) -> dict[str, Any]:
    """The changed tensors, once."""
    state = tensors_of(model)
    _check_elsewhere(state, base, types, type(model).__name__)
    chosen = {name: state[name].to(dtype) for name, dtype in types.items()}
    return {"kind": "static", "files": write_tensors(place, chosen)}


def write_individuals(
    place: Path,
    models: Iterable[tuple[str, nn.Module]],
    base: Mapping[str, Tensor],
    types: Types,
) -> dict[str, Any]:
    """The changed tensors of every model, given as (task, model), each in a directory of its own."""
    entries = []
    for i, (task, model) in enumerate(models):
        inside = Path(EXPERTS) / str(i)
        (place / inside).mkdir(parents=True)
        own = write_static(place / inside, model, base, types)
        entries.append({"task": task, "directory": str(inside), "files": own["files"]})
    return {"kind": "individuals", "experts": entries}


def write_mixtures(
    place: Path, parts: HostParts, base: Mapping[str, Tensor], types: Types
) -> dict[str, Any]:
    """Experts and gates; and the backbone, where it is not the base model's."""
    state = {name: parts.backbone[name] for name in base}
    _check_elsewhere(state, base, types, parts.kind)
    config: dict[str, Any] = {"kind": parts.kind, "mixtures": parts.mixtures}
    config["files"] = write_tensors(place, parts.beyond)
    if any(not torch.equal(state[name].to(base[name]), base[name]) for name in types):
        (place / BACKBONE).mkdir()
        chosen = {name: state[name].to(dtype) for name, dtype in types.items()}
        config["backbone_files"] = write_tensors(place / BACKBONE, chosen)
    return config


def _check_elsewhere(
    state: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    types: Types,
    what: str,
) -> None:
    """A state must be one of the base model's tensors, and equal to it but for ``types`` and rounding."""
    if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in base.items()}:
        raise TypeError(
            f"{what} cannot be saved as an artifact: it is neither a dynamic model of this package nor the host's SMILE or "
            "WEMoE, and its tensors are not those of the base model."
        )
    for name in set(base) - set(types):
        given, own = state[name].to(base[name]), base[name]
        if not (torch.equal(given, own) or torch.allclose(given, own)):
            raise CheckpointMismatchError(
                f"{what} differs from the base model in {name}, which no task changed; as an artifact it would not come "
                "back the same."
            )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once, as checkpoints are read."""
    source = ModuleSource(module, type(module).__name__)
    return {name: source.read(name) for name in source.infos()}


def _read(directory: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    found = open_tensors(directory, files)
    return {name: handle.get_tensor(name) for name, handle in found.items()}


@torch.no_grad()
def _read_static(
    directory: Path, config: Mapping[str, Any], backbone: nn.Module
) -> nn.Module:
    state = tensors_of(backbone)
    for name, value in _read(directory, config["files"]).items():
        state[name].copy_(value)
    return backbone


def _read_individuals(
    directory: Path, config: Mapping[str, Any], backbone: nn.Module
) -> dict[str, nn.Module]:
    return {
        entry["task"]: _read_static(
            directory / entry["directory"], entry, copy.deepcopy(backbone)
        )
        for entry in config["experts"]
    }


def _read_mixtures(
    directory: Path, config: Mapping[str, Any], backbone: nn.Module
) -> nn.Module:
    folded = _read(directory / BACKBONE, config.get("backbone_files", {}))
    beyond = _read(directory, config["files"])
    parts = HostParts(config["kind"], config["mixtures"], beyond, folded)
    return put_together(parts, backbone)


READERS = {
    "static": _read_static,
    "individuals": _read_individuals,
    "smile": _read_mixtures,
    "wemoe": _read_mixtures,
}
