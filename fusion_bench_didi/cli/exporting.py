"""``didi export`` and ``didi push``."""

from typing import Any

import click

from . import options

#: so many lines of a report are printed
_MOST = 16


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
    for parameter in click.get_current_context().command.params:
        options.not_beside(given, options.called(parameter), parameter.name)
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


@click.command(no_args_is_help=True)
@click.argument("directory")
@click.argument("repository")
@options.base
@click.option("--base-model", default=None, help="Repository of the base model, if the merge took it from a directory.")  # fmt: skip
@click.option("--license", default="unknown", show_default=True, help="For the card: mit, apache-2.0, ...")  # fmt: skip
@click.option("--dataset", "datasets", multiple=True, help="For the card, of the hub; may be repeated.")  # fmt: skip
@click.option("--private", is_flag=True, help="Make a private repository, if there is none.")  # fmt: skip
@click.option("--revision", default=None, help="Branch to write to; the main one if left out.")  # fmt: skip
def push(
    directory: str, repository: str, base: str | None, private: bool, **given: Any
) -> None:
    """Upload a merged model to the hub, as REPOSITORY (user/name), with a card that says how to load it.

    \b
    Example:
      didi push merged me/clip-eight-tasks --base-model openai/clip-vit-base-patch32 --license mit
    """
    from ..checkpoint.hub import check_upload
    from ..models import DynamicModel

    check_upload(repository)  # before a model is read for nothing
    model = DynamicModel.from_pretrained(directory, base)
    click.echo(model.push_to_hub(repository, private=private or None, **given))
