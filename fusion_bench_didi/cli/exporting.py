"""``didi export``."""

import click

from . import options

#: so many lines of a report are printed
_MOST = 16
#: Arguments and options, and the keywords that they stand for.
_SAID_BY = {
    "DIRECTORY": "directory",
    "OUT": "out",
    "--form": "form",
    "--task": "tasks",
    "--base": "base",
    "--overwrite": "overwrite",
}


@click.command(no_args_is_help=True)
@click.argument("directory")
@click.argument("out")
@click.option("--form", type=click.Choice(["peft", "plain", "patch"]), required=True, help="LoRA adapters; whole checkpoints; what changes in one.")  # fmt: skip
@click.option("--task", "tasks", multiple=True, help="May be repeated; all if left out.")  # fmt: skip
@options.base
@options.settings
@options.overwrite
def export(
    directory: str,
    out: str,
    form: str,
    tasks: tuple[str, ...],
    base: str | None,
    settings: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Write a merged model in the form of other libraries, an entry per task, held against the model before it appears.

    Settings are of --form peft: max_rank, factor_dtype, shared, carry and pad_rank; docs/export.md says what they do. With
    carry=all, embeddings, norms and heads come along, which only PEFT reads.

    \b
    Examples:
      didi export merged adapters --form peft
      didi export merged adapters --form peft -s max_rank=16 -s factor_dtype=bfloat16
      didi export merged adapters --form peft -s carry=all
      didi export merged models --form plain --task mnist
    """
    from ..export import export as write
    from ..export.common import folder

    given = options.values_of(settings)
    for option, key in _SAID_BY.items():
        options.not_beside(given, option, key)
    report = write(
        directory,
        out,
        form=form,
        tasks=list(tasks) or None,
        base=base,
        overwrite=overwrite,
        **given,
    )
    lines = str(report).splitlines()
    click.echo("\n".join(lines[:_MOST]))
    if len(lines) > _MOST:
        click.echo(
            f"  … and {len(lines) - _MOST} more lines; all of them in {out}/export.json"
        )
    for task in report.tensors:
        if folder(task) != task:
            click.echo(
                f"  {task} lies in {folder(task)}: not every file system takes its name"
            )
