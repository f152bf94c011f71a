"""Some tasks of a saved model, or of a library, without reading the others."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import backbone as backbones
from ..checkpoint.deltas import read_config, read_deltas
from ..checkpoint.hub import local_directory
from ..errors import DiDiError
from ..models.dynamic import DiDiModel, DynamicModel
from ..models.saving import check_config, check_shapes
from .facts import of_tasks
from .stored import Stored, check_known


def load_tasks(
    directory: str | Path,
    tasks: str | Iterable[str],
    backbone: nn.Module | str | Path | None = None,
) -> DynamicModel:
    """A saved model with some of its tasks, in the order given; the bytes of others are not read.

    The SHA-256 of the files is that of all tasks together, and is not looked at; shapes and types of what is read are.

    Args:
        backbone: the base model, or its directory or repository; loaded from where the merge took it if None.

    Raises:
        UnknownTaskError: for a task that is not there.
        DiDiError: for no tasks.
        CheckpointMismatchError: for damaged files, or another base model.
    """
    asked = named(tasks)
    place = local_directory(directory)
    config = read_config(place)
    check_config(DynamicModel, place, config)
    check_known(asked, config["tasks"], place)
    shared, experts = read_deltas(place, config, only=asked)
    info = config["info"]
    if len(asked) < len(config["tasks"]):
        info = of_tasks(info, asked)
    stored = Stored(
        shared,
        {task: experts[task] for task in asked},
        config["unit_bits"],
        config["backbone_bits"],
        info,
    )
    return on_backbone(stored.useful(), config["backbone"], place, backbone)


def on_backbone(
    stored: Stored,
    entry: Mapping[str, Any],
    place: Path,
    backbone: nn.Module | str | Path | None,
) -> DynamicModel:
    """The model of what is stored, on the base model that an entry of a configuration names.

    Args:
        place: for messages, and for relative paths in the entry.

    Raises:
        CheckpointMismatchError: if the backbone is another.
        DiDiError: if it cannot be loaded as data.
    """
    found = backbones.opened(entry, place, backbone, stored.touched)
    backbone, entry, spell, fresh = found
    stored = stored.spelled(spell)
    model = DiDiModel(
        backbone,
        stored.shared,
        stored.experts,
        unit_bits=stored.unit_bits,
        backbone_bits=stored.backbone_bits,
        info={**stored.info, "backbone": entry},
    )
    check_shapes(model, place)
    tensors = {name: model.base_tensor(name) for name in model.touched}
    backbones.check(place, entry, model.backbone, tensors, fresh=fresh)
    return model


def named(tasks: str | Iterable[str]) -> list[str]:
    """Names of tasks that are asked for, each once; a single one may stand for itself.

    Raises:
        DiDiError: for none.
    """
    asked = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    if not asked:
        raise DiDiError("No task is asked for. Name one or more.")
    return asked
