"""A merged model on the hub: its own files, with nothing of the machine that made it."""

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ..checkpoint.hub import repository_for, upload
from ..pools.entries import PLACE
from .interface import Merged
from .model_card import CardFacts
from .overview import is_repository, place_of
from .saving import save

log = logging.getLogger(__name__)


def push(
    model: Merged,
    repository: str,
    *,
    base_model: str | None,
    license: str,
    datasets: Sequence[str],
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    message: str,
) -> str:
    """Save the merged model to a temporary directory and upload that; where the commit is to be seen.

    The repository is made first, so that one that may not be written to is told before files are.

    Args:
        base_model: repository of the base model, where the merge took it from a directory or from memory.
        private, token: as of :func:`~fusion_bench_didi.checkpoint.hub.repository_for`.
        revision, message: as of :func:`~fusion_bench_didi.checkpoint.hub.upload`.

    Raises:
        DiDiError: if the hub refuses or cannot be asked.
    """
    name = repository_for(repository, private=private, token=token)
    published = copy.copy(model)
    published.info = portable(model.info, base_model)
    source = place_of(published.info.get("backbone", {}).get("source"))
    if not is_repository(source):
        log.warning(
            "Readers of %s have to pass the base model by hand: it was no repository of the hub. Give base_model=... if it is one.",
            repository,
        )
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "model"
        card = CardFacts(repository, license, tuple(datasets))
        save(published, directory, overwrite=False, card=card)
        return upload(
            directory,
            name,
            token=token,
            revision=revision,
            message=message,
        )


def portable(info: Mapping[str, Any], base_model: str | None = None) -> dict[str, Any]:
    """Facts of a model without places of this machine: directories by their last part, a base model by its repository."""
    backbone = dict(info.get("backbone", {}))
    source = backbone.get("source")
    if base_model is not None:
        mapping = isinstance(source, Mapping)
        source = {**source, PLACE: base_model} if mapping else base_model
    elif not is_repository(place_of(source)):
        source = None
    parents = {
        task: place if place is None or is_repository(place) else PurePath(place).name
        for task, place in info.get("parents", {}).items()
    }
    settings = dict(info.get("settings", {}))
    if settings.get("output_dir"):
        settings["output_dir"] = PurePath(str(settings["output_dir"])).name
    found = {**info, "backbone": {**backbone, "source": source}}
    if "edits" in info:
        edits = info["edits"]
        found["edits"] = [
            {k: v for k, v in edit.items() if k != "directories"} for edit in edits
        ]
    return {**found, "parents": parents, "settings": settings}
