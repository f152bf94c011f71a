"""``python -m fusion_bench_didi.editing add|remove|rescale|combine|library``: saved merged models are edited.

Directories are written anew with ``--out``, or replaced with ``--overwrite``; they appear whole or not at all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.backbone import resolved
from ..checkpoint.deltas import read_config
from ..deltas.storage import StorageReport
from ..errors import DiDiError
from .adding import add_task
from .combining import combine
from .library import AdapterLibrary
from .places import Edited
from .removing import remove_task
from .rescaling import rescale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands and their arguments."""
    commands = parser.add_subparsers(dest="edit", required=True, metavar="COMMAND")
    add = commands.add_parser("add", help="fit one more task, from its checkpoint")
    add.add_argument("directory", help="of the merged model")
    add.add_argument("checkpoint", help="repository or directory of a model or adapter")
    add.add_argument("--name", required=True, help="of the task")
    add.add_argument(
        "--budget", type=float, required=True, help="of the task, in fine-tuned models"
    )
    for key in ("exclude", "as-vectors", "own"):
        add.add_argument(f"--{key}", action="append", default=[], help="pattern of tensors, as of a merge; may be repeated")  # fmt: skip
    add.add_argument(
        "--base", help="repository or directory of the base model, if it moved"
    )
    add.add_argument("--device", default="cpu")
    remove = commands.add_parser("remove", help="drop a task")
    remove.add_argument("directory", help="of the merged model")
    remove.add_argument("name", help="of the task")
    lower = commands.add_parser(
        "rescale", help="store all tasks within a smaller budget"
    )
    lower.add_argument("directory", help="of the merged model")
    lower.add_argument(
        "--budget", type=float, required=True, help="of all, in fine-tuned models"
    )
    lower.add_argument("--device", default="cpu")
    both = commands.add_parser("combine", help="the tasks of two merged models")
    both.add_argument("directory", help="of the merged model")
    both.add_argument("other", help="directory of a merged model of the same base")
    for one in (add, remove, lower, both):
        one.add_argument("--out", dest="output_dir", help="directory to write")
        one.add_argument("--overwrite", action="store_true", help="replace what lies there; without --out the merged model itself")  # fmt: skip
    for one in (add, remove, both):
        one.add_argument("--drop-router", action="store_true", help="which knows the tasks that there are now")  # fmt: skip
    kept = commands.add_parser("library", help="tasks of one base, each by itself")
    kept.add_argument("library", help="directory of the library")
    kept.add_argument("--add", metavar="DIRECTORY", help="of a merged model")
    kept.add_argument("--task", dest="tasks", action="append", help="to add or remove; may be repeated, all of a model if left out")  # fmt: skip
    kept.add_argument("--remove", action="store_true", help="the tasks named")
    kept.add_argument("--overwrite", action="store_true")


def run(arguments: argparse.Namespace) -> Edited | list[str]:
    """Edit as the arguments of :func:`add_arguments` say, and print what came of it.

    Raises:
        DiDiError, FileExistsError, FileNotFoundError: as by the operations.
    """
    given = {k: v for k, v in vars(arguments).items() if v is not None}
    edit, options = given.pop("edit"), ("output_dir", "overwrite", "drop_router")
    common = {key: given[key] for key in options if key in given}
    if edit == "library":
        return _library(given)
    if edit == "add":
        base = given.get("base")
        found = add_task(
            given["directory"],
            given["checkpoint"],
            given["name"],
            budget=given["budget"],
            backbone=None if base is None else backbone_at(given["directory"], base),
            exclude=given["exclude"],
            as_vectors=given["as_vectors"],
            own=given["own"],
            device=given["device"],
            **common,
        )
    elif edit == "remove":
        found = remove_task(given["directory"], given["name"], **common)
    elif edit == "rescale":
        options = {"budget": given["budget"], "device": given["device"]}
        found = rescale(given["directory"], **options, **common)
    else:
        found = combine(given["directory"], given["other"], **common)
    print(told(found))
    return found


def told(edited: Edited) -> str:
    """What an edit did, for people."""
    lines = [
        f"{name}: {_size(storage)}, {len(storage.expert_bits)} tasks: {', '.join(storage.expert_bits)}"
        for name, storage in (("before", edited.before), ("after", edited.after))
    ]
    facts = edited.facts
    if "relative_error" in facts:
        what = "what was stored" if facts["operation"] == "rescale" else "its change"
        lines.append(f"{100 * facts['relative_error']:.2f} % of {what} is lost")
    if facts.get("apart"):
        lines.append(
            f"of {len(facts['apart'])} tensors the models share something else each"
        )
    return "\n".join([*lines, f"written: {edited.directory}"])


def _size(storage: StorageReport) -> str:
    return f"{storage.x_excl:.4f} fine-tuned models, {storage.excl_bits / 8e6:.2f} MB"


def _library(given: dict[str, Any]) -> list[str]:
    library, tasks = AdapterLibrary(given["library"]), given.get("tasks")
    if "add" in given and given["remove"]:
        raise DiDiError("--add and --remove do the opposite. Give one of them.")
    if "add" in given:
        library.add(given["add"], tasks, overwrite=given["overwrite"])
    elif given["remove"]:
        if not tasks:
            raise DiDiError("--remove: no --task is named. Name those that shall go.")
        for task in tasks:
            library.remove(task)
    elif tasks or given["overwrite"]:
        raise DiDiError("--task and --overwrite do nothing without --add or --remove.")
    for task in library.tasks:
        print(f"{library.bits(task) / 8e6:10.3f} MB  {task}")
    return library.tasks


def backbone_at(directory: str | Path, base: str) -> nn.Module:
    """The base model of a saved model, from elsewhere."""
    return resolved(read_config(directory)["backbone"], Path(directory), base)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        SystemExit: with a message, for what cannot be done.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fusion_bench_didi.editing", description=__doc__.split(": ")[1]
    )
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except (DiDiError, FileExistsError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
