"""``didi add-task``, ``remove-task``, ``rescale`` and ``combine``: merged models that are edited after the merge.

Options are called as the keywords of the functions that they are given to.
"""

from pathlib import Path
from typing import Any

import click

from ..files import from_home
from . import options


@click.command("add-task", no_args_is_help=True)
@click.argument("directory")
@click.argument("checkpoint")
@click.option("--name", default=None, help="Of the task; that of the CHECKPOINT's directory if left out.")  # fmt: skip
@click.option("--budget", type=float, required=True, help="What its expert may take, in units of one fine-tuned model.")  # fmt: skip
@click.option("--exclude", multiple=True, help="Pattern of tensors left at the base model's value; may be repeated.")  # fmt: skip
@click.option("--as-vectors", multiple=True, help="Pattern of 2-D tensors to store whole; may be repeated.")  # fmt: skip
@click.option("--own", multiple=True, help="Pattern of tensors kept as the task has them; may be repeated.")  # fmt: skip
@options.base
@options.device
@options.out_or_same
@options.overwrite
@options.drop_router
def add_task(
    directory: str, checkpoint: str, name: str | None, base: str | None, **given: Any
) -> None:
    """Add a task to a merged model from its CHECKPOINT alone; the outputs of the others stay as they are, to the bit.

    \b
    Example:
      didi add-task merged ./dtd --budget 0.2 -o merged_with_dtd
    """
    from .. import editing

    name = name or Path(checkpoint).name
    _say(editing.add_task(directory, checkpoint, name, backbone=base, **given))


@click.command("remove-task", no_args_is_help=True)
@click.argument("directory")
@click.argument("name")
@options.out_or_same
@options.overwrite
@options.drop_router
def remove_task(directory: str, name: str, **given: Any) -> None:
    """Take a task out of a merged model; the others stay as they are, to the bit.

    \b
    Example:
      didi remove-task merged svhn --overwrite
    """
    from .. import editing

    _say(editing.remove_task(directory, name, **given))


@click.command(no_args_is_help=True)
@click.argument("directory")
@click.option("--budget", type=float, required=True, help="Of all that is stored beyond the base model.")  # fmt: skip
@options.device
@options.out_or_same
@options.overwrite
@options.drop_router
def rescale(directory: str, **given: Any) -> None:
    """Make a merged model smaller, from what it stores: no checkpoint is needed.

    \b
    Example:
      didi rescale merged --budget 0.5 -o smaller
    """
    from .. import editing

    _say(editing.rescale(directory, **given))


@click.command(no_args_is_help=True)
@click.argument("first")
@click.argument("second")
@options.out_or_same
@options.overwrite
@options.drop_router
def combine(first: str, second: str, **given: Any) -> None:
    """Put the tasks of two merged models of one base model into one, every task as it was.

    \b
    Example:
      didi combine vision_a vision_b -o both
    """
    from .. import editing

    _say(editing.combine(first, second, **given))


@click.command(no_args_is_help=True)
@click.argument("directory")
@click.option("--add", default=None, metavar="MERGED", help="Merged model whose tasks are taken in.")  # fmt: skip
@click.option("--remove", multiple=True, metavar="TASK", help="Task to forget; may be repeated.")  # fmt: skip
@click.option("--task", "tasks", multiple=True, help="Of --add; may be repeated, all if left out.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Of --add: replace tasks that are there.")  # fmt: skip
def library(
    directory: str,
    add: str | None,
    remove: tuple[str, ...],
    tasks: tuple[str, ...],
    overwrite: bool,
) -> None:
    """List a library of tasks of one base model, each in files of its own; take some in, or forget some.

    \b
    Examples:
      didi library tasks/ --add merged
      didi library tasks/ --remove svhn
      didi library tasks/
    """
    from ..editing import AdapterLibrary
    from ..report.units import readable

    if add is None and (tasks or overwrite):
        raise click.UsageError("--task and --overwrite do nothing without --add.")
    if add is None and not from_home(directory).is_dir():
        raise click.UsageError(f"There is no library {directory}. Mend the path, or make one with --add.")  # fmt: skip
    found = AdapterLibrary(directory)
    if add is not None:
        found.add(add, tasks or None, overwrite=overwrite)
    for task in remove:
        found.remove(task)
    for task in found.tasks:
        click.echo(f"{readable(found.bits(task)):>10}  {task}")


def _say(edited: Any) -> None:
    from ..report.units import storage_line

    for what in ("before", "after"):
        click.echo(f"{what:<8}{storage_line(getattr(edited, what).as_dict())}")
    tasks = edited.after.expert_bits
    click.echo(f"{'now':<8}{len(tasks)} tasks: {', '.join(tasks)}")
    facts = edited.facts
    if "relative_error" in facts:
        of = "what was stored" if facts["operation"] == "rescale" else "its change"
        lost = f"{facts['relative_error']:.2g} of the energy of {of} is lost"
        click.echo(f"{'error':<8}{lost}")
    if apart := facts.get("apart"):
        click.echo(f"{'apart':<8}of {len(apart)} tensors each model shares its own")
    click.echo(f"{'written':<8}{edited.directory}")
