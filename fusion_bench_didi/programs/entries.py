"""What a comparison is asked to run: one entry per row, read and checked before anything runs."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from fusion_bench.utils import import_object
from fusion_bench.utils.hydra_utils import get_default_config_path
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

from ..errors import DiDiError, SettingsError
from ..options import check_fields, nearest, unknown_setting
from ..report.comparison import REFERENCES

#: where a row stands, what its method looks at, and what finds the task
Group = Literal["reference", "static", "dynamic", "routed"]
Data = Literal["none", "unlabelled", "labels", "test images"]
Routing = Literal["none", "oracle", "own", "representation", "projection", "mlp"]
#: the host's own program configuration, into which a method is composed
_ROOT = "fabric_model_fusion"


class ComparisonError(DiDiError):
    """The comparison cannot run, or cannot be continued, as it is configured."""


@dataclass(frozen=True)
class Entry:
    """An entry of the comparison: one row to be.

    Args:
        key: its name in the YAML, on the command line, and of its file.
        name: its label in tables and plots.
        method: name of a method configuration (``simple_average``, ``didi/tsv_c``), a configuration with ``_target_``,
            or ``pretrained`` / ``individuals``.
        choose: configurations that it is composed of, ``{base_method: didi/m}`` as on the command line
            ``method@method.base_method=didi/m``.
        overrides: values put into that configuration.
        budget_of: key of the entry whose storage beyond the backbone becomes ``budget``.
        fit_to_side: ``{at: 768, k: 128}`` sets ``k`` to 128 where the smallest side of a matrix is 768 or more, and to
            less in proportion below.
        family: entries of one family are joined to a curve, and marked as ours.
        published_x: the paper's printed storage for eight tasks, or None.
    """

    key: str
    name: str
    method: str | Mapping[str, Any]
    group: Group
    choose: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    budget_of: str | None = None
    fit_to_side: Mapping[str, int] | None = None
    family: str | None = None
    uses_data: Data = "none"
    routing: Routing = "none"
    published_x: int | float | None = None
    notes: str = ""

    def __post_init__(self):
        try:
            check_fields(self)
        except SettingsError as error:
            _, *faults = str(error).splitlines()
            told = (f"entries.{self.key}.{fault.strip()}" for fault in faults)
            raise ComparisonError("\n  ".join(told)) from error


#: Bytes of a key: names of files may have 255, and some is appended.
_LONGEST = 200


def _is_no_file(key: str) -> bool:
    """Whether a key is nothing that a file could be called."""
    return (
        key in ("", ".", "..")
        or not {"/", os.sep, "\0"}.isdisjoint(key)
        or len(os.fsencode(key)) > _LONGEST
    )


def one_line(error: Any) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())


def read_entries(
    config: Mapping[str, Any],
    only: Sequence[str] | str = (),
    skip: Sequence[str] | str = (),
) -> list[Entry]:
    """The entries of a configuration, in order.

    Args:
        config: key -> fields of :class:`Entry`; ``name`` defaults to the key.
        only, skip: keys, or one.

    Raises:
        ComparisonError: listing every fault.
    """
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)
    config = {str(key): value for key, value in config.items()}
    only, skip = _keys(only), _keys(skip)
    known = {f.name for f in fields(Entry)} - {"key"}
    faults, entries = [], []
    for key, value in config.items():
        if not isinstance(value, Mapping | None):
            faults.append(f"entries.{key}={value!r}: its fields are expected")
            continue
        if _is_no_file(key):
            faults.append(
                f"the key {key[:60]!r} names the files of its row, so it can be no path and takes at most {_LONGEST} bytes; "
                "a label, entries.KEY.name, may be anything."
            )
        value = {"name": key, **(value or {})}
        strange = sorted(set(value) - known, key=str)
        lacking = sorted({"method", "group"} - set(value))
        if strange or lacking:
            faults.append(f"entries.{key}: unknown {strange}, missing {lacking}")
            continue
        try:
            entries.append(Entry(key=key, **value))
        except ComparisonError as error:
            faults.append(str(error))
    for asked in (*only, *skip):
        if asked not in config:
            faults.append(f"there is no entry {asked!r}. {nearest(asked, config)}")
    chosen = [e for e in entries if (not only or e.key in only) and e.key not in skip]
    earlier = config.keys() - {entry.key for entry in entries}  # told of already
    for entry in chosen:
        if entry.budget_of and entry.budget_of not in earlier:
            faults.append(
                f"entries.{entry.key}.budget_of={entry.budget_of!r} is not among the entries before it"
            )
        earlier.add(entry.key)
    refuse(faults)
    return chosen


def refuse(faults: Sequence[str]) -> None:
    """
    Raises:
        ComparisonError: listing the faults, if there are some.
    """
    if faults:
        raise ComparisonError("The comparison cannot start:\n  " + "\n  ".join(faults))


def _keys(given: Any) -> tuple[str, ...]:
    """Keys as they were given: a list, or one alone, which may look like a number."""
    if isinstance(given, (list, tuple, ListConfig)):
        return tuple(map(str, given))
    return () if given is None else (str(given),)


def dependent(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Groups in which entries stand with those whose storage is their budget, or whose directory they share, all in order."""
    groups: dict[str | Path, list[Entry]] = {}
    for entry in entries:
        ties = [entry.key, *_directories(entry)]
        if entry.budget_of in groups:
            ties.append(entry.budget_of)
        joined = {id(groups[tie]): groups[tie] for tie in ties if tie in groups}
        ties += [tie for tie, group in groups.items() if id(group) in joined]
        group = sorted((*chain(*joined.values()), entry), key=entries.index)
        groups |= dict.fromkeys(ties, group)
    return list({id(group): group for group in groups.values()}.values())


def _directories(entry: Entry) -> Iterator[Path]:
    """What its configuration calls ``directory``, where methods leave what others of the same settings go on from."""
    for part in (*parts_of(entry.overrides), *parts_of(entry.method)):
        if place := part.get("directory"):
            yield Path(place)


def parts_of(config: Any) -> Iterator[Mapping[str, Any]]:
    """A configuration, and those within it; none of what is none."""
    if isinstance(config, Mapping):
        yield config
        for value in config.values():
            yield from parts_of(value)


def declared(entry: Entry) -> dict[str, Any]:
    """Settings that decide the numbers of the row, as far as they are known before anything ran; JSON-plain.

    Raises:
        as by :func:`composed`.
    """
    special = entry.method in REFERENCES
    return {
        "method": entry.method,
        "config": entry.method if special else composed(entry),
        "budget_of": entry.budget_of,
        "fit_to_side": entry.fit_to_side and dict(entry.fit_to_side),
    }


def completed(
    entry: Entry,
    config: Mapping[str, Any],
    *,
    smallest_side: int,
    budget: float | None,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The complete configuration of an entry's method.

    Args:
        config: what the entry alone makes of it, as by :func:`composed`.
        budget: values stored beyond the backbone.
        aliases: the program's task aliases, for every method that takes some; the entry's own come first.
    """
    config = dict(config)
    if budget is not None:
        config["budget"] = budget + bool(config.get("budget_includes_backbone"))
    if entry.fit_to_side:
        config |= fitted(entry.fit_to_side, smallest_side)
    if aliases and hasattr(import_object(config["_target_"]), "task_aliases"):
        config["task_aliases"] = {**aliases, **(config.get("task_aliases") or {})}
    return config


def composed(entry: Entry) -> dict[str, Any]:
    """The configuration of an entry's method, host's and plugin's YAML alike, with the entry's overrides.

    Raises:
        hydra.errors.MissingConfigException: if there is no such method.
        SettingsError: if an override names a setting that the method does not have.
    """
    if isinstance(entry.method, str):
        config = _compose(entry.method, entry.choose)
    else:
        config = OmegaConf.create(dict(entry.method))
    OmegaConf.set_struct(config, True)
    for value in config.values():
        if isinstance(value, DictConfig) and not value:  # made to be filled
            OmegaConf.set_struct(value, False)
    try:
        config = OmegaConf.merge(config, dict(entry.overrides))
    except ConfigKeyError as error:
        owner, _, key = error.full_key.rpartition(".")
        known = OmegaConf.select(config, owner) if owner else config
        where = f"entries.{entry.key}.overrides" + (f".{owner}" if owner else "")
        raise unknown_setting(where, key, known) from error
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def fitted(fit: Mapping[str, int], smallest_side: int) -> dict[str, int]:
    """Ranks given for matrices whose smallest side is ``at``, in proportion for smaller ones."""
    scale = min(1.0, smallest_side / fit["at"])
    ranks = {key: value for key, value in fit.items() if key != "at"}
    return {key: max(1, round(value * scale)) for key, value in ranks.items()}


#: Folders that are searched for configurations beside the host's and the plugins', where no Hydra program runs that knows its own.
_SEARCHED: ContextVar[Sequence[str]] = ContextVar("searched", default=())


@contextmanager
def searched(places: Sequence[str]) -> Iterator[None]:
    """While the block runs, methods are looked for in these places too, as of ``hydra.searchpath``."""
    earlier = _SEARCHED.set(places)
    try:
        yield
    finally:
        _SEARCHED.reset(earlier)


def search_path() -> list[str]:
    """The override by which a composition finds the configurations that the run itself finds; none where it was given no place."""
    places = _SEARCHED.get()
    if not places and HydraConfig.initialized():
        places = HydraConfig.get().searchpath
    return [f"hydra.searchpath={json.dumps([*places])}"] if places else []


def hydra_begun() -> AbstractContextManager[Any]:
    """While the block runs there is Hydra: that of the command line, or one with the host's configuration, whose own start looks up by
    which line of the program it is called."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return initialize_config_dir(get_default_config_path(), version_base=None)


def _compose(name: str, parts: Mapping[str, str]) -> DictConfig:
    # pools are the program's, and composing those of the host's example would take longest
    overrides = [f"method={name}", "~modelpool", "~taskpool"]
    overrides += [f"method@method.{key}={value}" for key, value in parts.items()]
    overrides += search_path()
    with hydra_begun():
        config = compose(_ROOT, overrides=overrides)
    return OmegaConf.create(OmegaConf.to_container(config.method, resolve=True))
