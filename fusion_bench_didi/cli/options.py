"""Options that several commands have."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import click
from click.core import ParameterSource

from ..errors import DiDiError, Spelling, as_key

#: Options by the keywords that they stand for, where they are called otherwise.
_CALLED = {
    "output_dir": "out",
    "path.log_dir": "out",
    "backbone": "base",
    "modelpool.root": "suite",
    "taskpool.root": "suite",
}
#: What commands do not take that have settings of one method.
_POOLS = ("modelpool", "taskpool")

out = click.option(
    "-o", "--out", required=True, help="Directory to write; appears whole or not at all."
)  # fmt: skip
out_or_same = click.option(
    "-o", "--out", "output_dir", default=None, help="Directory to write; without it DIRECTORY itself, if --overwrite allows it."
)  # fmt: skip
overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace a model that lies where it shall be written."
)  # fmt: skip
base = click.option(
    "--base", default=None, help="Directory or repository of the base model, if it is not where the merge took it."
)  # fmt: skip


def _to_be_had(_: click.Context, option: click.Parameter, device: str) -> str:
    """A device that tensors can be made on here."""
    if device not in ("cpu", "auto"):
        import torch

        try:
            torch.zeros(1, device=device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise click.BadParameter(
                f"{device} is not to be had here ({first_line(error)[:200]}). Give cpu.", param=option
            ) from None  # fmt: skip
    return device


device = click.option(
    "--device", default="cpu", show_default=True, callback=_to_be_had, help="Where the arithmetic happens."
)  # fmt: skip
device_or_auto = click.option(
    "--device", default="auto", show_default=True, callback=_to_be_had,
    type=click.Choice(["auto", "cpu", "cuda", "mps"]), help="Where the arithmetic happens.",
)  # fmt: skip
drop_router = click.option(
    "--drop-router", is_flag=True, help="Leave out a router, which is for what the model holds now."
)  # fmt: skip
settings = click.option(
    "-s", "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting, may be repeated."
)  # fmt: skip


def called(parameter: click.Parameter) -> str:
    """An option or argument as it is typed or shown."""
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.human_readable_name


def spelling(command: click.Command | None) -> Spelling:
    """How settings are typed behind a command: as an option of its own, else by ``-s``."""
    known = {p.name: p for p in command.params} if command else {}

    def spell(key: str, value: str) -> str:
        found = known.get(key, known.get(_CALLED.get(key)))
        if isinstance(found, click.Option):
            option = called(found)
            given = "PATTERN" if found.multiple else value
            return option if found.is_flag or not value else f"{option} {given}"
        if "settings" not in known:
            return as_key(key, value)
        if key.partition(".")[0] in _POOLS:
            return f"{as_key(key, value)} with fusion_bench"
        return f"-s {as_key(key, value)}"

    return spell


class Faults:
    """Gathers what several blocks raise, so that a user is told all of it at once."""

    def __init__(self) -> None:
        self.found: list[BaseException] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        told = (DiDiError, FileExistsError, FileNotFoundError, click.UsageError)
        if isinstance(error, told):
            self.found.append(error)
        return isinstance(error, told)

    def check(self) -> None:
        """Raise what was found, if anything.

        Raises:
            click.UsageError: of all faults, if there are several; one is raised as it is.
        """
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise click.UsageError("\n".join(map(_message, self.found)))


def _message(error: BaseException) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    return str(error)


def silence_host() -> None:
    """The host prints every call that a configuration makes, with all arguments."""
    from fusion_bench.utils import instantiate_utils

    instantiate_utils.set_print_function_call_permeanent(False)


@contextmanager
def host_unheard() -> Iterator[None]:
    """While the block runs, what the host's methods print is dropped, unless what is logged is asked for; bars are shown."""
    if click.get_current_context().find_root().params["verbose"]:
        yield
        return
    import rich

    console = rich.get_console()
    before = console.__dict__
    rich.reconfigure(file=sys.stdout)  # bars stay where they are seen
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        console.__dict__ = before


def given(name: str) -> bool:
    """Whether an option of the command that runs was typed."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def not_beside(settings: Iterable[str], option: str, *keys: str) -> None:
    """Settings by keys that an option stands for: which of them counts, nobody knows.

    Raises:
        click.UsageError: naming both.
    """
    for key in settings:
        if any(key == known or key.startswith(f"{known}.") for known in keys):
            raise click.UsageError(f"{key}=... is what {option} says. Leave one of them out.")  # fmt: skip


def values_of(settings: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as a mapping, values read as YAML.

    Raises:
        click.BadParameter: for what is no pair, cannot be read or has no value, and for a key that is given twice.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if wrong := [one for one in settings if "=" not in one]:
        raise click.BadParameter(f"{wrong[0]!r} is no KEY=VALUE.", param_hint="--set")
    keys = [one.partition("=")[0] for one in settings]
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise click.BadParameter(
            f"{twice[0]} is given {keys.count(twice[0])} times. Give it once.",
            param_hint="--set",
        )
    for key in keys:
        if within := [k for k in keys if k.startswith((f"{key}.", f"{key}["))]:
            raise click.BadParameter(
                f"{within[0]} is a part of {key}, which is given too. Give one of them.",
                param_hint="--set",
            )
    for one in settings:
        try:
            OmegaConf.from_dotlist([one])
        except (YAMLError, OmegaConfBaseException) as error:
            raise _unread(one, error) from None
    try:
        found = OmegaConf.from_dotlist(list(settings))
        return OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _unread(" ".join(settings), error) from None


def first_line(error: Exception) -> str:
    """What an error of a library says first."""
    return str(error).strip().partition("\n")[0].rstrip(".")


def _unread(given: str, error: Exception) -> click.BadParameter:
    return click.BadParameter(
        f"{given!r} cannot be read ({first_line(error)}). Write the value as in YAML.",
        param_hint="--set",
    )
