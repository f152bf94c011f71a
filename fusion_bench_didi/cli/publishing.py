"""``didi push``."""

import click

from . import options


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
    directory: str,
    repository: str,
    base: str | None,
    base_model: str | None,
    license: str,
    datasets: tuple[str, ...],
    private: bool,
    revision: str | None,
) -> None:
    """Upload a merged model to the hub, as REPOSITORY (user/name), with a card that says how to load it.

    \b
    Example:
      didi push merged me/clip-eight-tasks --base-model openai/clip-vit-base-patch32 --license mit
    """
    from ..models import DynamicModel

    model = DynamicModel.from_pretrained(directory, base)
    where = model.push_to_hub(
        repository,
        base_model=base_model,
        license=license,
        datasets=datasets,
        private=private or None,
        revision=revision,
    )
    click.echo(where)
