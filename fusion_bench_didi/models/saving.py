"""Dynamic models as directories that refer to their backbone and hold everything else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ..checkpoint import backbone as backbones
from ..checkpoint.deltas import FORMAT, read_config, versions
from ..checkpoint.directory import CONFIG, whole_directory, write_json
from ..deltas.storage import StorageReport
from ..routers.base import Router
from ..routers.files import read_router, write_router
from .model_card import model_card


class Saved(Protocol):
    """What is written of a model, and by what it comes back."""

    backbone: nn.Module
    unit_bits: int
    backbone_bits: int
    info: dict[str, Any]
    router: Router | None

    @property
    def storage(self) -> StorageReport: ...

    def base_tensors(self) -> dict[str, Tensor]: ...

    def attach_router(self, router: Router | None) -> Any: ...

    def write_config(self, directory: Path, parts: Mapping[str, Any]) -> None: ...

    def write_parts(self, directory: Path) -> dict[str, Any]: ...

    @classmethod
    def from_parts(
        cls,
        directory: Path,
        config: Mapping[str, Any],
        backbone: nn.Module,
        info: Mapping[str, Any],
    ) -> "Saved": ...


Model = TypeVar("Model", bound=Saved)


def save(model: Saved, directory: str | Path, *, overwrite: bool) -> None:
    """Write weights, configuration and model card; the directory appears whole or not at all.

    Raises:
        FileExistsError: if it exists and ``overwrite`` is false.
    """
    with whole_directory(directory, overwrite=overwrite) as place:
        model.write_config(place, model.write_parts(place))


def write_config(model: Saved, directory: Path, parts: Mapping[str, Any]) -> None:
    """Write what stands beside the weights: configuration, router and model card.

    Args:
        parts: what the model's ``write_parts`` returned.
    """
    known = model.info.get("backbone", {})
    config = {
        "format": FORMAT,
        "model_class": type(model).__name__,
        "unit_bits": model.unit_bits,
        "backbone_bits": model.backbone_bits,
        "backbone": backbones.describe(model.backbone, model.base_tensors(), known),
        "storage": model.storage.as_dict(),
        "info": {k: v for k, v in model.info.items() if k != "backbone"},
        "versions": versions(),
        **parts,
    }
    if model.router is not None:
        config["router"] = write_router(directory, model.router)
    write_json(directory / CONFIG, config)
    home = type(model).__module__.rpartition(".")[0]
    (directory / "README.md").write_text(model_card(config, home))


def load(cls: type[Model], directory: str | Path, backbone: nn.Module | None) -> Model:
    """What :func:`save` wrote.

    Args:
        backbone: the base model; loaded from where the merge took it if None.

    Raises:
        CheckpointMismatchError: for damaged files, or another backbone than the one that was merged.
    """
    config = read_config(directory)
    if backbone is None:
        backbone = backbones.load_backbone(config["backbone"])
    model = cls.from_parts(
        Path(directory),
        config,
        backbone,
        {**config["info"], "backbone": config["backbone"]},
    )
    backbones.check(directory, config["backbone"], model.base_tensors())
    if "router" in config:
        model.attach_router(read_router(Path(directory), config["router"]))
    return model
