"""What is known to fail before anything is read: methods that there are not, values out of range, places that are taken."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from itertools import islice
from typing import Any

from fusion_bench import BaseAlgorithm
from fusion_bench.utils import instantiate
from fusion_bench.utils.instantiate_utils import set_print_function_call
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException
from hydra.utils import get_object
from omegaconf import OmegaConf

from ..checkpoint.directory import check_target
from ..errors import some
from ..files import from_home
from ..report.comparison import REFERENCES
from .entries import (
    Entry,
    completed,
    declared,
    hydra_begun,
    one_line,
    parts_of,
    refuse,
    search_path,
)


def checked(
    entries: Sequence[Entry], left: Collection[str]
) -> dict[str, dict[str, Any]]:
    """What the entries declare, by key, if nothing is known of them that must fail.

    Args:
        left: keys of those that are still to be made.

    Raises:
        ComparisonError: listing every fault.
    """
    faults: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    taken: dict[str, str] = {}
    for entry in entries:
        try:
            found[entry.key] = declared(entry)
            if entry.key in left and entry.method not in REFERENCES:
                config = _whole(entry, found[entry.key]["config"])
                for one in _methods_in(config):
                    _check_method(one, entry.key, taken)
        except Exception as error:  # of Hydra, OmegaConf, or of whoever's the method is
            faults.append(_told(entry.key, error))
    refuse(faults)
    return found


def _whole(entry: Entry, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a row will have, with some budget in place of one that is found later."""
    if "_target_" not in config:
        raise ValueError("method has no _target_, which is its class.")
    fit = entry.fit_to_side or {"at": 1}
    if "at" not in fit:
        raise ValueError("fit_to_side has no at, the side that its ranks are for.")
    sets = {key: "fit_to_side" for key in fit if key != "at"}
    if entry.budget_of:
        sets["budget"] = "budget_of"
    for key, field in sets.items():
        if isinstance(entry.method, str) and key not in config:
            raise ValueError(f"{field} sets {key}, which {entry.method} does not have.")
    budget = 1.0 if entry.budget_of else None
    return completed(entry, config, smallest_side=fit["at"], budget=budget)


def _methods_in(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration of a method, and those of methods within it."""
    yield config
    for part in islice(parts_of(config), 1, None):
        cls = get_object(part["_target_"]) if "_target_" in part else None
        if isinstance(cls, type) and issubclass(cls, BaseAlgorithm):
            yield part


def _check_method(config: Mapping[str, Any], key: str, taken: dict[str, str]) -> None:
    """A method must accept its settings, make a model, and have a place of its own for it.

    Args:
        taken: keys of entries by the places of their models; this one's is added.
    """
    with (
        open(os.devnull, "w") as nowhere,  # the host asks for the number of its file
        redirect_stdout(nowhere),
        set_print_function_call(False),
    ):
        recursive = config.get("_recursive_", False)
        method = instantiate(OmegaConf.create(dict(config)), _recursive_=recursive)
    if config.get("dry_run"):
        raise ValueError("dry_run=true makes no model to compare; leave it out.")
    if hasattr(type(method), "overwrite") and method.output_dir is not None:
        place = os.path.realpath(from_home(method.output_dir))
        check_target(method.output_dir, overwrite=method.overwrite)
        if taken.setdefault(place, key) != key and not method.overwrite:
            raise ValueError(
                f"output_dir={method.output_dir} is that of entries.{taken[place]} too. Give each its own."
            )


def _told(key: str, error: Exception) -> str:
    """What is wrong with an entry, in a line that names it."""
    where = f"entries.{key}"
    if isinstance(error, MissingConfigException):
        name = (error.missing_cfg_file or "").removeprefix("method/")
        known = method_names()
        close = get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are {some(known, 12)}."
        if "." in name:
            hint += f" A class is given as method: {{_target_: {name}}}."
        return f"{where}: there is no method {name}. {hint}"
    text = one_line(error)
    if text.startswith(where):
        return text
    known = isinstance(error, (ValueError, FileExistsError))
    return f"{where}: {text}" if known else f"{where}: {type(error).__name__}: {text}"


def method_names() -> list[str]:
    """The methods that there are, the host's and all plugins'."""
    with hydra_begun():
        return sorted(_named(GlobalHydra.instance().config_loader(), "method"))


def _named(loader: ConfigLoader, group: str) -> Iterator[str]:
    """Names of the configurations of a group and of those within it, as they are after ``method=``."""
    searched = {"overrides": search_path()}
    for name in loader.get_group_options(group, ObjectType.CONFIG, **searched):
        yield f"{group}/{name}".partition("/")[2]
    for name in loader.get_group_options(group, ObjectType.GROUP, **searched):
        yield from _named(loader, f"{group}/{name}")
