"""``didi add-task``, ``remove-task``, ``rescale`` and ``combine``: merged models that are edited after the merge."""

from pathlib import Path
from typing import Any

import click

from . import options


@click.command("add-task", no_args_is_help=True)
@click.argument("directory")
@click.argument("checkpoint")
@click.option("--name", default=None, help="Of the task; that of the CHECKPOINT's directory if left out.")  # fmt: skip
@click.option("--budget", type=float, required=True, help="What its expert may take, in units of one fine-tuned model.")  # fmt: skip
@options.base
@options.out_or_same
@options.overwrite
@options.drop_router
def add_task(
    directory: str,
    checkpoint: str,
    name: str | None,
    budget: float,
    base: str | None,
    out: str | None,
    overwrite: bool,
    drop_router: bool,
) -> None:
    """Add a task to a merged model from its CHECKPOINT alone; the outputs of the others stay as they are, to the bit.

    \b
    Example:
      didi add-task merged ./dtd --budget 0.2 -o merged_with_dtd
    """
    from .. import editing
    from ..checkpoint.backbone import resolved
    from ..checkpoint.deltas import read_config

    backbone = None
    if base is not None:
        entry = read_config(directory)["backbone"]
        backbone, _ = resolved(entry, Path(directory), base)
    found = editing.add_task(
        directory,
        checkpoint,
        name or Path(checkpoint).name,
        budget=budget,
        backbone=backbone,
        output_dir=out,
        overwrite=overwrite,
        drop_router=drop_router,
    )
    _say(found)


@click.command("remove-task", no_args_is_help=True)
@click.argument("directory")
@click.argument("name")
@options.out_or_same
@options.overwrite
@options.drop_router
def remove_task(
    directory: str, name: str, out: str | None, overwrite: bool, drop_router: bool
) -> None:
    """Take a task out of a merged model; the others stay as they are, to the bit.

    \b
    Example:
      didi remove-task merged svhn --overwrite
    """
    from .. import editing

    _say(
        editing.remove_task(
            directory,
            name,
            output_dir=out,
            overwrite=overwrite,
            drop_router=drop_router,
        )
    )


@click.command(no_args_is_help=True)
@click.argument("directory")
@click.option("--budget", type=float, required=True, help="Of all that is stored beyond the base model.")  # fmt: skip
@options.out_or_same
@options.overwrite
def rescale(directory: str, budget: float, out: str | None, overwrite: bool) -> None:
    """Make a merged model smaller, from what it stores: no checkpoint is needed.

    \b
    Example:
      didi rescale merged --budget 0.5 -o smaller
    """
    from .. import editing

    found = editing.rescale(
        directory, budget=budget, output_dir=out, overwrite=overwrite
    )
    _say(found)


@click.command(no_args_is_help=True)
@click.argument("first")
@click.argument("second")
@options.out_or_same
@options.overwrite
@options.drop_router
def combine(
    first: str, second: str, out: str | None, overwrite: bool, drop_router: bool
) -> None:
    """Put the tasks of two merged models of one base model into one, every task as it was.

    \b
    Example:
      didi combine vision_a vision_b -o both
    """
    from .. import editing

    found = editing.combine(
        first, second, output_dir=out, overwrite=overwrite, drop_router=drop_router
    )
    _say(found)


def _say(edited: Any) -> None:
    from ..units import storage_line

    for what in ("before", "after"):
        click.echo(f"{what:<8}{storage_line(getattr(edited, what).as_dict())}")
    click.echo(f"{'written':<8}{edited.directory}")
