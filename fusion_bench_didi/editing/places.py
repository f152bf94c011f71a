"""Where an edit happens: a model in memory, or a saved directory of which nothing but the deltas is read."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from torch import nn

from ..checkpoint.deltas import read_config, read_deltas, versions
from ..checkpoint.directory import alone, check_target, whole_directory
from ..checkpoint.fields import Field
from ..checkpoint.ours import CONFIG
from ..checkpoint.stream import write_deltas
from ..deltas.storage import StorageReport
from ..errors import DiDiError, SettingsError, spelled
from ..files import from_home
from ..models.dynamic import DynamicModel
from ..models.overview import told_edit
from ..models.saving import accounted, check_config, write_described
from ..report.units import storage_line
from ..routers.base import Router
from ..routers.files import FILE as ROUTER_FILE
from ..routers.files import check_router
from .stored import Stored

Place = Union[DynamicModel, str, Path]


@dataclass(frozen=True)
class Edited:
    """The result of an edit.

    Args:
        before, after: the storage accounts.
        model: that was edited in memory, or loaded to be.
        directory: that was written.
        facts: of the operation, as in the model's ``info["edits"]``.
    """

    before: StorageReport
    after: StorageReport
    model: DynamicModel | None
    directory: Path | None
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        where = f", in {self.directory}" if self.directory else ""
        return f"<Edited: {told_edit(self.facts)}{where}; {storage_line(self.after.as_dict())}>"


@dataclass(frozen=True)
class Target:
    """The directory that an edit writes.

    Args:
        sure: as of :func:`~fusion_bench_didi.checkpoint.directory.whole_directory`.
    """

    place: str | Path
    overwrite: bool
    sure: bool | None

    def whole(self) -> AbstractContextManager[Path]:
        """The directory to write into, which appears whole or not at all."""
        return whole_directory(self.place, overwrite=self.overwrite, sure=self.sure)


def in_place(
    place: Place,
    edit: Callable[[Stored], Stored],
    *,
    output_dir: str | Path | None,
    overwrite: bool,
    drop_router: bool,
    keeps_tasks: bool = False,
) -> Edited:
    """Edit a model in memory, or a directory without its backbone.

    Args:
        edit: pure; what it raises leaves everything as it was.
        output_dir: is written; the directory itself if None, which ``overwrite`` must allow.
        drop_router: take off a router.
        keeps_tasks: a router that does not look at the experts stays.

    Raises:
        SettingsError: if nothing would be written.
        DiDiError: for a router that would no longer fit.
    """
    with target_of(place, output_dir, overwrite=overwrite) as target:
        if isinstance(place, nn.Module):
            return edited_model(place, edit, target, drop_router, keeps_tasks)
        source, config = from_home(place), read_config(place)
        before, router = stored_of(source, config), None
        if "router" in config:
            entry = Field(source / CONFIG, config)["router"]
            router = check_router(entry, before.tasks)
        stays = router_stays(router, str(source), drop_router, keeps_tasks)
        after = edit(before).of_directories(source)
        return written(target, before, after, config, source if stays else None)


def edited_model(
    model: DynamicModel,
    edit: Callable[[Stored], Stored],
    target: Target | None,
    drop_router: bool,
    keeps_tasks: bool = False,
) -> Edited:
    """Edit a model in memory, and save it if there is a target."""
    before = Stored.of(model)
    stays = router_stays(model.router, "The model", drop_router, keeps_tasks)
    after = edit(before)
    router = model.router if stays else None
    model.attach_router(None)
    model.hold(after.shared, after.experts)
    model.info = dict(after.info)
    model.unit_bits, model.backbone_bits = after.unit_bits, after.backbone_bits
    if router is not None:
        model.attach_router(router)
    last, written_to = after.info["edits"][-1], None
    if target is not None:
        with target.whole() as directory:
            model.write_config(directory, model.write_parts(directory))
        written_to = from_home(target.place)
    return Edited(before.storage, model.storage, model, written_to, last)


@contextmanager
def target_of(
    place: Place, output_dir: str | Path | None, *, overwrite: bool
) -> Iterator[Target | None]:
    """The directory that will be written, looked at before any work; None for none.

    Models are to be read in the block: while it runs no other run may write to a directory that is replaced, which may be one of
    those that are read.

    Raises:
        SettingsError: if the edit of a directory would be lost, or ``overwrite`` does nothing.
        FileExistsError, DiDiError: as by :func:`~fusion_bench_didi.checkpoint.directory.check_target`.
    """
    target = output_dir
    if output_dir is None and not isinstance(place, nn.Module):
        if not overwrite:
            raise SettingsError(
                f"{place} would be edited and written nowhere. Give {spelled('output_dir')}, or {spelled('overwrite', 'true')} to replace "
                "the directory."
            )
        target = place
    if target is None and overwrite:
        raise SettingsError("overwrite is of output_dir, which is not set.")
    if target is None:
        yield None
        return
    there = check_target(target, overwrite=overwrite)
    with alone(there, named=target) if there.exists() else nullcontext() as sure:
        yield Target(target, overwrite, sure)


def stored_of(directory: Path, config: Mapping[str, Any]) -> Stored:
    """The stored part of a saved model; its backbone is not needed.

    Raises:
        CheckpointMismatchError: for damaged files, or a model that is no deltas per task.
        DiDiError: for a directory of format 1.
    """
    check_config(DynamicModel, directory, config)
    if "fingerprint" in config["backbone"]:
        raise DiDiError(
            f"{directory} was written by an early version, whose checks of the base model are others. Load the model and save it "
            "again, then edit that."
        )
    shared, experts = read_deltas(directory, config)
    routing = 0
    if "router" in config:
        routing = Field(directory / CONFIG, config)["storage"]["routing_bits"].value
    return Stored(
        shared,
        experts,
        config["unit_bits"],
        config["backbone_bits"],
        config["info"],
        routing,
        getattr(torch, config["backbone"]["dtype"] or "float32"),
    )


def written(
    target: Target,
    before: Stored,
    stored: Stored,
    config: Mapping[str, Any],
    router_of: Path | None = None,
) -> Edited:
    """Write a model whose backbone is not at hand; the directory appears whole or not at all.

    Args:
        before: what it was.
        config: of a saved model of the same backbone.
        router_of: directory whose router is kept; ``config`` is its configuration.
    """
    with target.whole() as place:
        parts = write_deltas(place, stored.shared, stored.experts)
        new = accounted(stored, config["model_class"], config["backbone"])
        new |= {"versions": versions(), **parts}
        if router_of is not None:
            new["router"] = config["router"]
            if (router_of / ROUTER_FILE).exists():
                shutil.copyfile(router_of / ROUTER_FILE, place / ROUTER_FILE)
        write_described(place, new)
    last, directory = stored.info["edits"][-1], from_home(target.place)
    return Edited(before.storage, stored.storage, None, directory, last)


def router_stays(
    router: Router | None, what: str, drop_router: bool, keeps_tasks: bool
) -> bool:
    """Whether a router is one of the edited model too.

    Raises:
        DiDiError: if it is not, and may not go.
    """
    if router is None:
        return False
    stays = keeps_tasks and not router.looks_at_experts and not drop_router
    if not stays:
        of = "experts" if keeps_tasks else "tasks"
        check_router_goes(drop_router, what, of=of)
    return stays


def check_router_goes(drop_router: bool, what: str, *, of: str = "tasks") -> None:
    """A router of other tasks, or experts, may only go if that is wanted.

    Raises:
        DiDiError: if it is not.
    """
    if not drop_router:
        raise DiDiError(
            f"{what} has a router, which is for the {of} that there are now. Leave it out, {spelled('drop_router', 'true')}, and make a "
            "router for the edited model."
        )
