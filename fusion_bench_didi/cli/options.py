"""Options that several commands have."""

from collections.abc import Sequence
from typing import Any

import click

out = click.option(
    "-o",
    "--out",
    required=True,
    help="Directory to write; appears whole or not at all.",
)
out_or_same = click.option(
    "-o", "--out", default=None, help="Directory to write; without it DIRECTORY itself, if --overwrite allows it."
)  # fmt: skip
overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace a model that lies where it shall be written."
)  # fmt: skip
base = click.option(
    "--base", default=None, help="Directory or repository of the base model, if it is not where the merge took it."
)  # fmt: skip
device = click.option(
    "--device", default="cpu", show_default=True, help="Where the arithmetic happens."
)
drop_router = click.option(
    "--drop-router", is_flag=True, help="Leave out a router, which is for the tasks that there are now."
)  # fmt: skip
settings = click.option(
    "-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting, may be repeated."
)  # fmt: skip


def silence_host() -> None:
    """The host prints every call that a configuration makes, with all arguments."""
    from fusion_bench.utils import instantiate_utils

    instantiate_utils.set_print_function_call_permeanent(False)


def values_of(settings: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as a mapping, values read as YAML.

    Raises:
        click.BadParameter: for what is no pair.
    """
    from omegaconf import OmegaConf

    if wrong := [one for one in settings if "=" not in one]:
        raise click.BadParameter(f"{wrong[0]!r} is no KEY=VALUE.", param_hint="--set")
    return OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)), resolve=True)
