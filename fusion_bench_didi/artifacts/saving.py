"""Saving and loading of artifacts: static models, models per task, dynamic models, and the host's mixtures.

::

    <directory>/config.json
    <directory>/model.safetensors               what lies beyond the backbone
    <directory>/experts/<i>/model.safetensors   individuals: one per task
    <directory>/backbone/model.safetensors      only where the merge overwrote the backbone itself (WEMoE)

Dynamic models of this package are written by their own ``save_pretrained``. A static merge is the tensors that some task
changed, once; individuals are the same per task, heads in the task's own size; SMILE is its low-rank factors, biases and
gates, WEMoE its task vectors and routers. The base model is referred to, not contained.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import backbone as backbones
from ..checkpoint.deltas import read_config, versions, write_manifest
from ..checkpoint.directory import whole_directory
from ..checkpoint.fields import Field
from ..checkpoint.hub import local_directory
from ..checkpoint.ours import CONFIG
from ..errors import CheckpointMismatchError
from ..files import from_home
from ..models.dynamic import DynamicModel
from ..models.saving import CLASSES
from ..task_vectors.live_models import uncompiled
from .forms import (
    BACKBONE,
    READERS,
    Types,
    check_forms,
    tensors_of,
    write_individuals,
    write_mixtures,
    write_static,
)
from .host_moe import take_apart


@dataclass(frozen=True)
class Written:
    """Bytes of a saved artifact.

    Args:
        beyond: of the tensors beyond the backbone.
        backbone: of the values that take the backbone's place, 0 where the base model's own are used.
        headers: what the files beyond the backbone hold beside tensors.
        replaced: of the base model's tensors for which the files hold a value instead, so that they are not needed.
    """

    beyond: int
    backbone: int
    headers: int
    replaced: int = 0


def save_artifact(
    model: nn.Module | Iterable[tuple[str, nn.Module]],
    directory: str | Path,
    *,
    base: nn.Module,
    types: Types,
    known: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Written:
    """Write a merged model in the form that its account assumes; the directory appears whole or not at all.

    Args:
        model: what a method returned, or the individuals as (task, model), one after the other.
        base: the base model, as the pool gives it.
        types: tensors that some task changed and the data type that the account has them in, the checkpoints' own; none
            for the base model itself.
        known: where the base model lies, from :func:`~fusion_bench_didi.pools.opening.backbone_reference`; without it the base model has to be
            given again to load the artifact.

    Raises:
        FileExistsError: if the directory exists and ``overwrite`` is false.
        TypeError: for a model of unknown form.
        CheckpointMismatchError: if the model differs from the base model where no task does, so that it could not be
            loaded again.
    """
    directory = from_home(directory)
    if isinstance(model, nn.Module):
        model = uncompiled(model)
    if isinstance(model, DynamicModel):
        model.save_pretrained(directory, overwrite=overwrite)
        return written(directory)
    base = uncompiled(base)
    with whole_directory(directory, overwrite=overwrite) as place:
        state = tensors_of(base)
        config = {
            "names": list(types),
            "backbone": backbones.describe(base, state, known or {}),
            "versions": versions(),
        }
        if not isinstance(model, nn.Module):
            config |= write_individuals(place, model, state, types)
        elif parts := take_apart(model):
            config |= write_mixtures(place, parts, state, types)
        else:
            config |= write_static(place, model, state, types)
        write_manifest(place / CONFIG, config)
    return written(directory)


def load(
    directory: str | Path,
    backbone: nn.Module | str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module | dict[str, nn.Module]:
    """Load a saved model of any method; individuals come as a dictionary of models.

    Args:
        directory: or repository of the hub, ``"user/name"``.
        backbone: the base model, which is taken over, or its directory or repository; loaded from where the merge took it if None.
        revision, token: of the repository.

    Raises:
        CheckpointMismatchError: for damaged files, or another backbone than the one that was merged.
    """
    place = local_directory(directory, revision=revision, token=token)
    config = read_config(place)
    fields = Field(place / CONFIG, config)
    if "model_class" in config:
        if CLASSES[fields["model_class"].one_of(CLASSES)] == "deltas":
            return DynamicModel.from_pretrained(place, backbone)
        from ..recombination.model import RecombinedModel

        return RecombinedModel.from_pretrained(place, backbone)
    check_forms(fields, place)
    names = fields["names"].texts()
    backbones.check_entry(fields["backbone"])
    found = backbones.opened(config["backbone"], place, backbone, names)
    backbone, entry, spell, fresh = found
    names = [*map(spell, names)]
    state = tensors_of(backbone)
    if lacking := [name for name in names if name not in state]:
        raise CheckpointMismatchError(
            f"The backbone ({type(backbone).__name__}) has no tensor {lacking[0]!r}, which {place} changes. Pass the base "
            "model of the merge."
        )
    named = {name: state[name] for name in names}
    backbones.check(place, entry, backbone, named, fresh=fresh)
    return READERS[config["kind"]](place, config, backbone, named, spell)


#: the name until now
load_artifact = load


def written(directory: str | Path) -> Written:
    """Bytes of what lies there, from the headers of the files, and what it is from the configuration."""
    beyond = backbone = headers = 0
    for file in from_home(directory).rglob("*.safetensors"):
        with file.open("rb") as opened:
            header = 8 + int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size - header
        if file.parent.name == BACKBONE:
            backbone += size
        else:
            beyond += size
            headers += header
    config, replaced = read_config(directory), backbone
    if config.get("kind") == "static":
        replaced = beyond
    elif config.get("kind") == "individuals":
        replaced = beyond // len(config["experts"])  # each holds the same tensors
    return Written(beyond, backbone, headers, replaced)
