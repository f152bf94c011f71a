"""Dynamic models as directories that refer to their backbone and hold everything else."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from torch import nn

from ..checkpoint import backbone as backbones
from ..checkpoint.deltas import entries_of, read_config, versions, write_manifest
from ..checkpoint.directory import whole_directory
from ..checkpoint.fields import Field, inside
from ..checkpoint.hub import local_directory
from ..checkpoint.ours import CONFIG
from ..errors import CheckpointMismatchError, DiDiError
from ..routers.base import Router
from ..routers.files import check_router, read_router, write_router
from ..task_vectors.tower_names import Spelling
from .interface import Merged
from .model_card import CardFacts, model_card

#: Classes of saved models, and the key under which their manifest says what is stored.
CLASSES = {"DynamicModel": "deltas", "DiDiModel": "deltas", "RecombinedModel": "chains"}

Model = TypeVar("Model", bound=Merged)


def parts_of(cls: type) -> str | None:
    """What models of a class, or of a user's own of ours, are stored as: deltas or chains; None for any other class."""
    names = (kind.__name__ for kind in cls.__mro__)
    return next((CLASSES[name] for name in names if name in CLASSES), None)


def save(
    model: Merged,
    directory: str | Path,
    *,
    overwrite: bool,
    card: CardFacts = CardFacts(),
) -> None:
    """Write weights, configuration and model card; the directory appears whole or not at all.

    Raises:
        FileExistsError: if it exists and ``overwrite`` is false, or is no saved model.
        DiDiError: if another run is writing to it, or it cannot be made.
    """
    with whole_directory(directory, overwrite=overwrite) as place:
        model.write_config(place, model.write_parts(place), card=card)


def write_config(
    model: Merged,
    directory: Path,
    parts: Mapping[str, Any],
    *,
    card: CardFacts = CardFacts(),
    taken: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write what stands beside the weights, which the model's ``write_parts`` wrote: configuration, router and model card.

    Args:
        parts: what ``write_parts`` returned.
        card: what its maker says.
        taken: checksums of the base model's tensors that were taken before.
    """
    tensors = model.base_tensors()
    backbone = backbones.describe(
        model.backbone,
        tensors,
        model.info.get("backbone", {}),
        replaced=set(model.touched) - set(tensors),
        taken=taken,
    )
    config = {**described(model), "backbone": backbone, "versions": versions(), **parts}
    if model.router is not None:
        config["router"] = write_router(directory, model.router)
    write_described(directory, config, card)


def write_described(
    directory: Path, config: Mapping[str, Any], card: CardFacts = CardFacts()
) -> None:
    """Write a configuration, and the model card that tells of it."""
    (directory / "README.md").write_text(model_card(config, card))
    write_manifest(directory / CONFIG, config)


def described(model: Merged) -> dict[str, Any]:
    """Facts about a model, JSON-plain, without what only files know."""
    cls = type(model.backbone)
    known = {"class": f"{cls.__module__}.{cls.__qualname__}", "source": None}
    backbone = {**known, **model.info.get("backbone", {})}
    found = accounted(model, type(model).__name__, backbone)
    found["tasks"] = list(model.modulators.keys())
    if model.router is not None:
        found["router"] = {"kind": model.router.kind}
    return found


def accounted(
    held: Any, model_class: str, backbone: Mapping[str, Any]
) -> dict[str, Any]:
    """What a configuration says of a model in any case.

    Args:
        held: the model, or what it stores, :class:`~fusion_bench_didi.editing.stored.Stored`.
        backbone: the entry for it.
    """
    return {
        "model_class": model_class,
        "unit_bits": held.unit_bits,
        "backbone_bits": held.backbone_bits,
        "backbone": backbone,
        "storage": held.storage.as_dict(),
        "info": {k: v for k, v in held.info.items() if k != "backbone"},
    }


def load(
    cls: type[Model],
    directory: str | Path,
    backbone: nn.Module | str | Path | None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Model:
    """Load a model that :func:`save` wrote.

    Args:
        directory, backbone, revision, token: as of :meth:`~.dynamic.DynamicModel.from_pretrained`.

    Raises:
        CheckpointMismatchError: for damaged files, another backbone than the one that was merged, or a model of another class.
        DiDiError: if the backbone cannot be loaded as data, see :mod:`fusion_bench_didi.checkpoint.loaders`.
    """
    place = local_directory(directory, revision=revision, token=token)
    config = read_config(place)
    check_config(cls, place, config)
    cls = _class_of(cls, place, config)
    names = (delta["tensor"] for delta in config.get("deltas", ()))
    found = backbones.opened(config["backbone"], place, backbone, names)
    backbone, entry, spell, fresh = found
    info = {**config["info"], "backbone": entry}
    model = cls.from_parts(place, _spelled(config, spell), backbone, info)
    check_shapes(model, place)
    tensors = model.base_tensors()
    backbones.check(place, entry, model.backbone, tensors, fresh=fresh)
    if "router" in config:
        _attach(model, read_router(place, config["router"]), place)
    return model


def _spelled(config: Mapping[str, Any], spell: Spelling) -> dict[str, Any]:
    """The configuration with tensors named as the backbone of this transformers names them."""
    told: dict[str, Any] = {}
    if deltas := config.get("deltas"):
        told["deltas"] = [{**d, "tensor": spell(d["tensor"])} for d in deltas]
    if "groups" in config:
        told["groups"] = {
            label: {**group, "tensors": [*map(spell, group["tensors"])]}
            for label, group in config["groups"].items()
        }
    return {**config, **told}


def _class_of(cls: type[Model], place: Path, config: Mapping[str, Any]) -> type[Model]:
    """The class that was saved, which must be the one asked for or one of its kind.

    Raises:
        CheckpointMismatchError: if it is not.
    """
    name = config["model_class"]
    if cls.__name__ not in CLASSES and name in {c.__name__ for c in cls.__mro__}:
        return cls  # a user's own, of ours
    kinds = [cls]
    for kind in kinds:
        if kind.__name__ == name:
            return kind
        kinds += kind.__subclasses__()
    raise _other_class(cls, place, config)


def _other_class(
    cls: type, place: Path, config: Mapping[str, Any]
) -> CheckpointMismatchError:
    name, method = config["model_class"], config.get("info", {}).get("method")
    by = f" of {method}" if method else ""
    return CheckpointMismatchError(
        f"{place} holds a {name}{by}, which is no {cls.__name__}. Load it by {name}.from_pretrained, or by fusion_bench_didi.load."
    )


def _attach(model: Merged, router: Router, place: Path) -> None:
    """Give the model its router, which may name layers or tensors that the backbone does not have."""
    try:
        for name, change in getattr(router, "anchor_changes", dict)().items():
            if model.base_tensor(name).shape != change.shape:
                raise ValueError(f"{name} is of shape {tuple(change.shape)}")
        model.attach_router(router)
    except DiDiError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointMismatchError(
            f"The router of {place} does not go with this backbone ({type(error).__name__}: {error}). Copy or write the whole "
            "directory again."
        ) from error


def check_config(cls: type, place: Path, config: Mapping[str, Any]) -> None:
    """The manifest of a model of a class must say all that is read of it, before anything is read.

    Raises:
        CheckpointMismatchError: naming the field that does not.
    """
    fields, parts = Field(place / CONFIG, config), parts_of(cls)
    name = fields["model_class"].one_of({*CLASSES, cls.__name__})
    if CLASSES.get(name, parts) != parts:
        raise _other_class(cls, place, config)
    fields["unit_bits"].integer(1)
    fields["backbone_bits"].integer()
    fields["info"].mapping()
    backbones.check_entry(fields["backbone"])
    tasks = fields["tasks"].texts()
    if parts == "deltas":
        entries_of(fields)
    else:
        inside(place, "modules")
        if sorted(fields[parts].mapping()) != sorted(tasks):
            fields[parts].fail(f"a chain for each of {tasks}")
        for _, chain in fields[parts].entries():
            chain.texts()
    if "router" in fields:
        check_router(fields["router"], tasks)


def check_shapes(model: Merged, place: Path) -> None:
    """Check stored shapes against the backbone's tensors, before anything is worked out.

    Raises:
        CheckpointMismatchError: naming the tensor that is not, or that the backbone lacks.
    """
    experts = (expert.deltas for expert in model.modulators.values())
    for name, delta in (p for held in (model.shared, *experts) for p in held.items()):
        here = tuple(model.base_tensor(name).shape)
        if delta.kind != "own" and delta.shape != here:
            raise CheckpointMismatchError(
                f"{place} changes {name} of shape {delta.shape}, the backbone ({type(model.backbone).__name__}) has it as "
                f"{here}. Pass the base model of the merge, or copy the whole directory again."
            )
