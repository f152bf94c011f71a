"""Routers by name, and what is written of them beside a saved model."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..checkpoint.tensors import file_digest
from ..errors import CheckpointMismatchError
from .base import Router
from .features import FeatureRouter, OracleRouter
from .projection import ProjectionRouter
from .representation import RepresentationRouter

ROUTERS: dict[str, type[Router]] = {
    cls.kind: cls
    for cls in (FeatureRouter, OracleRouter, ProjectionRouter, RepresentationRouter)
}


FILE = "router.safetensors"


def make_router(kind: str, tasks: list[str], **options: Any) -> Router | None:
    """A router by name; None for ``none``.

    Raises:
        ValueError: for an unknown name.
    """
    if kind == "none":
        return None
    if kind not in ROUTERS:
        names = ", ".join(("none", *sorted(ROUTERS)))
        raise ValueError(f"router={kind!r}; choose one of {names}.")
    return ROUTERS[kind](tasks, **options)


def write_router(directory: Path, router: Router) -> dict[str, Any]:
    """Write its tensors, if it has any; returns the entry for :func:`read_router`."""
    tensors = {name: t.contiguous().cpu() for name, t in router.tensors().items()}
    entry: dict[str, Any] = {"kind": router.kind, "options": router.options()}
    if tensors:
        save_file(tensors, directory / FILE)
        entry["sha256"] = file_digest(directory / FILE)
    return entry


def read_router(directory: Path, entry: dict[str, Any]) -> Router:
    """What :func:`write_router` wrote.

    Raises:
        CheckpointMismatchError: for a missing or altered file.
    """
    router = ROUTERS[entry["kind"]](**entry["options"])
    if "sha256" in entry:
        file = directory / FILE
        if not file.is_file() or file_digest(file) != entry["sha256"]:
            raise CheckpointMismatchError(
                f"{file} is missing or was altered. Copy or write the whole directory again."
            )
        router.load(load_file(file))
    return router
