"""``didi inspect`` and ``didi verify``."""

import json
from pathlib import Path
from typing import Any

import click

from . import options


@click.command(no_args_is_help=True)
@click.argument("directory")
@click.option("--json", "as_json", is_flag=True, help="Everything that the directory says of itself.")  # fmt: skip
def inspect(directory: str, as_json: bool) -> None:
    """Show a merged model on one screen: tasks, budget, storage by part, bits and ranks, errors, parents.

    DIRECTORY may be a repository of the hub. No weights are read; the same as print(model) in Python.

    \b
    Examples:
      didi inspect merged
      didi inspect merged --json
    """
    from ..checkpoint.backbone import check_entry
    from ..checkpoint.deltas import read_config
    from ..checkpoint.fields import Field
    from ..checkpoint.hub import local_directory
    from ..checkpoint.ours import CONFIG
    from ..models.overview import overview

    place = local_directory(directory)
    config = read_config(place)
    check_entry(Field(place / CONFIG, config)["backbone"])
    if as_json:
        told = {k: v for k, v in config.items() if k not in ("deltas", "files")}
        click.echo(json.dumps(told, indent=1))
    else:
        click.echo(overview(config))


@click.command(no_args_is_help=True)
@click.argument("directory")
@options.base
@click.option("--files-only", is_flag=True, help="Do without the base model: files and their contents alone.")  # fmt: skip
def verify(directory: str, base: str | None, files_only: bool) -> None:
    """Check a merged model: checksums, contents, the base model, and that every task's weights are finite.

    \b
    Examples:
      didi verify merged
      didi verify merged --base ./clip
      didi verify merged --files-only
    """
    from ..checkpoint.deltas import read_config
    from ..checkpoint.hub import local_directory

    if files_only and base is not None:
        raise click.UsageError("--files-only does without --base. Leave one of them out.")  # fmt: skip
    place = local_directory(directory)
    config = read_config(place)
    check_files(place, config)
    click.echo(f"files: {_count(config)}, whole and as they were written")
    if files_only:
        return
    from ..artifacts.saving import load
    from ..errors import some

    model = load(place, base)
    click.echo("base model: the one of the merge")
    tasks, names = finite(model), strange_in_base(model)
    but = f" but for the base model's {some(names)}, left as they are" if names else ""
    click.echo(f"tasks: {tasks}, every weight finite{but}")


def check_files(place: Path, config: dict[str, Any]) -> None:
    """Hold every file with weights of a saved model, of any kind, against what was written.

    Raises:
        CheckpointMismatchError: for one that is missing, damaged, or of something else.
    """
    from ..artifacts.forms import check_forms, open_forms
    from ..checkpoint.deltas import read_deltas
    from ..checkpoint.fields import Field, inside
    from ..checkpoint.ours import CONFIG
    from ..recombination.library import load_modules
    from ..recombination.model import MODULES
    from ..routers.files import read_router

    fields = Field(place / CONFIG, config)
    if "deltas" in fields:
        read_deltas(place, config)
    elif "chains" in fields:
        chains = [chain.texts() for _, chain in fields["chains"].entries()]
        load_modules(inside(place, MODULES), [key for keys in chains for key in keys])
    else:
        check_forms(fields, place)
        open_forms(place, config)
    if "router" in fields:
        read_router(place, fields["router"].mapping())


def _count(config: dict[str, Any]) -> str:
    deltas = len(config.get("deltas", ()))
    return f"all, with {deltas} stored tensors" if deltas else "all"


def finite(model: Any) -> int:
    """The number of tasks, all of whose weights are numbers; 1 for a model of all tasks.

    Raises:
        NonFiniteError: naming the first tensor that holds others.
    """
    from ..errors import NonFiniteError
    from ..models import DynamicModel
    from ..task_vectors.live_models import all_tensors

    if isinstance(model, DynamicModel):
        tasks = len(model.tasks)
        weights = (
            (task, name, model.task_tensor(name, expert))
            for task, expert in model.modulators.items()
            for name in model.touched
        )
    else:
        models = model if isinstance(model, dict) else {"the model": model}
        tasks = len(models)
        weights = (
            (owner, name, value)
            for owner, one in models.items()
            for name, value in all_tensors(one).items()
        )
    for owner, name, value in weights:
        if not value.isfinite().all():
            raise NonFiniteError(
                f"{owner}: {name} holds NaN or infinity. Merge again, or copy the directory again."
            )
    return tasks


def strange_in_base(model: Any) -> list[str]:
    """Saved tensors of the base model that no task changes, as where they were excluded, and that hold NaN or infinity."""
    from ..models import DynamicModel
    from ..task_vectors.live_models import all_tensors

    if not isinstance(model, DynamicModel):
        return []
    saved = model.backbone.state_dict().keys() - set(model.touched)
    found = all_tensors(model.backbone).items()
    return [n for n, v in found if n in saved and not v.isfinite().all()]
