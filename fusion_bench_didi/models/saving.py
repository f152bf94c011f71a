"""Dynamic models as directories that refer to their backbone and hold everything else."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checkpoint import backbone as backbones
from ..checkpoint.deltas import FORMAT, read_config, read_deltas, versions
from ..checkpoint.stream import write_deltas
from ..checkpoint.directory import CONFIG, whole_directory, write_json
from .model_card import model_card

if TYPE_CHECKING:
    from .dynamic import DynamicModel


class Saving:
    """The part of a :class:`~.dynamic.DynamicModel` that writes and reads it."""

    def save_pretrained(
        self, save_directory: str | Path, *, overwrite: bool = False, **_: Any
    ) -> None:
        """Write weights, configuration and model card; the directory appears whole or not at all.

        Raises:
            FileExistsError: if it exists and ``overwrite`` is false.
        """
        with whole_directory(save_directory, overwrite=overwrite) as directory:
            self.write_config(directory, self.write_parts(directory))

    def write_config(self, directory: Path, parts: Mapping[str, Any]) -> None:
        """Write what stands beside the weights: configuration, router and model card.

        Args:
            parts: what :meth:`write_parts` returned.
        """
        known = self.info.get("backbone", {})
        config = {
            "format": FORMAT,
            "model_class": type(self).__name__,
            "unit_bits": self.unit_bits,
            "backbone_bits": self.backbone_bits,
            "backbone": backbones.describe(self.backbone, self.base_tensors(), known),
            "storage": self.storage.as_dict(),
            "info": {k: v for k, v in self.info.items() if k != "backbone"},
            "versions": versions(),
            **parts,
        }
        if self.router is not None:
            from ..routers.files import write_router

            config["router"] = write_router(directory, self.router)
        write_json(directory / CONFIG, config)
        home = type(self).__module__.rpartition(".")[0]
        (directory / "README.md").write_text(model_card(config, home))

    def write_parts(self, directory: Path) -> dict[str, Any]:
        """Write what is stored; returns what :meth:`from_parts` needs, JSON-plain, with ``tasks`` among it."""
        return write_deltas(
            directory,
            dict(self.shared.items()),
            {t: dict(e.deltas.items()) for t, e in self.modulators.items()},
        )

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, backbone: nn.Module | None = None
    ) -> "DynamicModel":
        """Load what :meth:`save_pretrained` wrote.

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
            from ..routers.files import read_router

            model.attach_router(read_router(Path(directory), config["router"]))
        return model

    @classmethod
    def from_parts(
        cls,
        directory: Path,
        config: Mapping[str, Any],
        backbone: nn.Module,
        info: Mapping[str, Any],
    ) -> "DynamicModel":
        """The model from what :meth:`write_parts` wrote."""
        return cls(
            backbone,
            *read_deltas(directory, config),
            unit_bits=config["unit_bits"],
            backbone_bits=config["backbone_bits"],
            info=info,
        )
