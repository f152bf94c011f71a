"""Saving of dynamic models through any host model pool."""

import functools
import logging
from typing import Any

from ..checkpoint.directory import check_target
from ..distributed.ranks import ALONE, Ranks
from ..errors import SettingsError, as_key, spelled_as
from .dynamic import DynamicModel

log = logging.getLogger(__name__)

_MARK = "_didi_saving"


def attach_saving(modelpool: Any, ranks: Ranks = ALONE) -> None:
    """Make ``modelpool.save_model`` write dynamic models by their own ``save_pretrained``; of several ranks, rank 0's.

    The host's pools would write a pickle of the state dict, or call the backbone's ``save_pretrained``, which saves one
    task's weights as if they were the model.
    """
    if getattr(modelpool, _MARK, False):
        return
    setattr(modelpool, _MARK, True)
    stock = modelpool.save_model

    @functools.wraps(stock)
    def save_model(model: Any, path: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, DynamicModel):
            stock(model, path, *args, **kwargs)
            return
        overwrite = bool(kwargs.pop("overwrite", False))
        named = [key for key, value in kwargs.items() if value]
        if ignored := [*(repr(value) for value in args if value), *named]:
            log.warning(
                "%s %s no effect on how a %s is saved.",
                ", ".join(ignored),
                "have" if len(ignored) > 1 else "has",
                type(model).__name__,
            )
        try:
            if ranks.leads:
                with spelled_as(_as_save_kwargs):
                    model.save_pretrained(path, overwrite=overwrite)
        except BaseException as error:
            ranks.fail(error)
            raise
        ranks.gather(None)  # it lies there for all

    modelpool.save_model = save_model


def _as_save_kwargs(key: str, value: str) -> str:
    """As whoever saves through the program has it."""
    return f"+merged_model_save_kwargs.{as_key(key, value)}"


def run_directory(program: Any) -> str | None:
    """The directory of a program's run: that of its logger, which is that of its paths; None where it has neither.

    Args:
        program: the host's, or None.
    """
    if place := getattr(program, "log_dir", None):
        return place
    paths = getattr(program, "path", None) or {}
    return paths.get("log_dir")


def fill_log_dir(program: Any) -> None:
    """Put the directory of the run for ``{log_dir}`` where there is no logger: the host would write to a place of that name.

    Raises:
        SettingsError: naming a setting for which there is no directory.
    """
    for key in ("report_save_path", "merged_model_save_path"):
        path = getattr(program, key, None)
        if not path or "{log_dir}" not in path or program.log_dir is not None:
            continue
        if (place := run_directory(program)) is None:
            raise SettingsError(
                f"{key}={path} is in the directory of a logger, and the run has neither a logger nor path.log_dir. Give it another "
                "place, or the run one of both (fabric.loggers)."
            )
        setattr(program, key, path.format(log_dir=place))


def saved_at(program: Any) -> str | None:
    """Where the program will save its merged model; None where it will not.

    Args:
        program: the host's, or None.
    """
    path = getattr(program, "merged_model_save_path", None)
    if path and "{log_dir}" in path and program.log_dir is not None:
        path = path.format(log_dir=program.log_dir)
    return path or None


def check_saving(program: Any, output_dir: str | None = None) -> None:
    """Where the program will save its merged model must be free; it looks only after the merge.

    Args:
        program: the host's, or None.
        output_dir: where the method writes its model by itself.

    Raises:
        FileExistsError, DiDiError: as by :func:`~fusion_bench_didi.checkpoint.directory.check_target`.
        SettingsError: if both are one directory.
    """
    path = saved_at(program)
    if path is None:
        return
    options = getattr(program, "merged_model_save_kwargs", None) or {}
    with spelled_as(_as_save_kwargs):
        place = check_target(path, overwrite=bool(options.get("overwrite", False)))
    if output_dir and check_target(output_dir, overwrite=True) == place:
        raise SettingsError(
            f"output_dir and merged_model_save_path are both {place}, and what is in output_dir is saved. Leave one of them out."
        )
