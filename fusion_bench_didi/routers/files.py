"""Routers by name, and what is written of them beside a saved model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.fields import Field
from ..checkpoint.ours import CONFIG
from ..checkpoint.tensors import open_tensors
from ..errors import CheckpointMismatchError, SettingsError
from ..files import file_digest
from .base import Router
from .features import FeatureRouter, OracleRouter
from .projection import ProjectionRouter
from .representation import _ANCHOR, RepresentationRouter

ROUTERS: dict[str, type[Router]] = {
    cls.kind: cls
    for cls in (FeatureRouter, OracleRouter, ProjectionRouter, RepresentationRouter)
}


#: ``projection``, which may be called ``subspace`` too: by the experts' subspaces. ``representation``: by how far each expert is from the merged
#: model. ``mlp``: a small network that is fitted. ``oracle``: is told. ``none``: no router.
RouterName = Literal[
    "subspace", "projection", "representation", "mlp", "oracle", "none"
]
ALIASES = {"subspace": "projection"}
FILE = "router.safetensors"


def make_router(kind: RouterName, tasks: list[str], /, **options: Any) -> Router | None:
    """A router by name; None for ``none``.

    Raises:
        SettingsError: for an unknown name, for options that the router does not have, and for some that have no effect beside
            the others.
    """
    if "tasks" in options:
        raise SettingsError(
            f"tasks={options['tasks']!r}: a router is for all tasks of its model, {tasks}. Leave it out."
        )
    kind = ALIASES.get(kind, kind)
    if kind == "none":
        if options:
            raise SettingsError(f"{', '.join(options)}: router=none has no options.")
        return None
    if kind not in ROUTERS:
        names = ", ".join(("none", *sorted({*ROUTERS, *ALIASES})))
        raise SettingsError(f"router={kind!r}; choose one of {names}.")
    router = ROUTERS[kind](tasks, **options)
    if faults := list(_without_effect(router, options)):
        raise SettingsError("\n".join(faults))
    return router


def _without_effect(router: Router, options: Mapping[str, Any]) -> Iterator[str]:
    """What was asked of a router that does nothing beside the other options."""
    falls_back = router.fallback == "shared"
    if router.threshold and not falls_back:
        yield f"threshold={router.threshold} is of fallback=shared, not {router.fallback}."
    if falls_back and not router.threshold:
        yield "fallback=shared has no effect with threshold=0, below which no confidence is. Give a threshold."
    if router.hard and not falls_back and options.get("temperature", 1.0) != 1.0:
        yield f"temperature={router.temperature} has no effect on hard weights without a fallback."
    if router.head != "none":
        for key in ("normalization", "prefer"):
            if key in options:
                yield f"{key} is of distances that are compared as they are, not of head={router.head}."


def write_router(directory: Path, router: Router) -> dict[str, Any]:
    """Write its tensors, if it has any; returns the entry for :func:`read_router`."""
    tensors = {name: t.contiguous().cpu() for name, t in router.tensors().items()}
    entry: dict[str, Any] = {"kind": router.kind, "options": router.options()}
    if tensors:
        save_file(tensors, directory / FILE)
        entry["sha256"] = file_digest(directory / FILE)
    return entry


def check_router(entry: Field, tasks: Sequence[str]) -> Router:
    """The router of an entry, without its tensors.

    Args:
        tasks: of the model.

    Raises:
        CheckpointMismatchError: for options that it does not take, or that are none.
    """
    kind, options = entry["kind"].one_of(ROUTERS), entry["options"]
    for name, option in options.entries():
        value = option.value
        if name == "tasks" and value != list(tasks):
            option.fail(f"the tasks of the model, {list(tasks)}")
        if type(value) is float and not math.isfinite(value):
            option.fail("a finite number")
        if name == "directions":
            option.integer(1)
        if name == "layers" and value is not None:
            for layer in option.elements():
                if type(layer.value) is not int:
                    layer.text()
    if "sha256" in entry:
        entry["sha256"].digest()
    try:
        router = ROUTERS[kind](**options.mapping())
        if set(options.mapping()) != set(router.options()):
            raise TypeError(f"there are {sorted(router.options())}")
        return router
    except (TypeError, ValueError) as error:
        raise CheckpointMismatchError(
            f"{entry.file}: router.options do not make a {kind} router ({error}). Copy or write the whole directory again."
        ) from error


def read_router(directory: Path, entry: Mapping[str, Any]) -> Router:
    """Read a router that :func:`write_router` wrote.

    Raises:
        CheckpointMismatchError: for a missing or altered file, or one that holds something else.
    """
    field = Field(directory / CONFIG, entry, "router")
    router = check_router(field, field["options"]["tasks"].texts())
    tensors: dict[str, Tensor] = {}
    if "sha256" in entry:
        found = open_tensors(directory, {FILE: entry["sha256"]})
        tensors = {name: handle.get_tensor(name) for name, handle in found.items()}
    if not _fits(router, tensors):
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        raise CheckpointMismatchError(
            f"{directory / FILE} holds {shapes}, which a {router.kind} router with head={router.head} for {len(router.tasks)} "
            "tasks does not. Copy or write the whole directory again."
        )
    return router.load(tensors)


def _fits(router: Router, tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors are those of the router's head, and of an anchor where it may have one."""
    anchored = isinstance(router, RepresentationRouter)
    head = {
        name: tuple(value.shape)
        for name, value in tensors.items()
        if not (anchored and name.startswith(_ANCHOR))
    }
    floating = all(value.is_floating_point() for value in tensors.values())
    if router.head == "none" or not head:
        return floating and not head
    count, (size, *_) = len(router.tasks), (*head.get("head_mean", ()), 0)
    width, *_ = (*head.get("head_bias", ()), 0)
    shapes = {"head_mean": (size,), "head_scale": (size,)}
    if router.head == "mlp":
        shapes |= {"head_weight": (width, size), "head_bias": (width,)}
        shapes |= {"head_out_weight": (count, width), "head_out_bias": (count,)}
    else:
        shapes |= {"head_weight": (count, size), "head_bias": (count,)}
    return floating and head == shapes
