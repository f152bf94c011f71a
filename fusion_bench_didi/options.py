"""Types of settings with their ranges, and the one check of a setting against its type."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, get_type_hints

from omegaconf import Container, OmegaConf
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from .errors import SettingsError


def _named(path: str | Path) -> str | Path:
    if not str(path).strip():
        raise ValueError("a path is expected")
    return path


def _compiling(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"a regular expression is expected ({error})") from error
    return pattern


#: A number of steps, images, generations or tasks.
Count = Annotated[int, Field(ge=0, le=10**7)]
#: A count of which nothing happens at zero.
PositiveCount = Annotated[int, Field(ge=1, le=10**7)]
#: A part of a whole, more than nothing.
Share = Annotated[float, Field(gt=0, le=1)]
#: The same, and never all of it.
Part = Annotated[float, Field(gt=0, lt=1)]
#: From nothing to all.
Fraction = Annotated[float, Field(ge=0, le=1)]
#: Of what is drawn at random.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
#: Images per task to fit a head to.
ImageCount = Annotated[int, Field(ge=2, le=10**7)]
#: Task pool name -> model name.
Aliases = Mapping[str, str] | None
#: A factor of weights or task vectors.
Scale = Annotated[float, Field(ge=-100, le=100)]
#: A factor, rate or weight that cannot be negative.
NonNegative = Annotated[float, Field(ge=0, le=1e9)]
#: The same without zero.
Positive = Annotated[float, Field(ge=1e-9, le=1e9)]
#: An amount of memory; ``inf`` for no limit.
Gigabytes = Annotated[float, Field(ge=0)]
#: Where to write.
FilePath = Annotated[str | Path, AfterValidator(_named)]
#: A regular expression.
Pattern = Annotated[str, AfterValidator(_compiling)]
#: Patterns of names, as of ``fnmatch``; one alone may stand for itself.
Patterns = Sequence[str] | str | None


def check_arguments(instance: Any) -> None:
    """Hold the attributes that are named after arguments of ``__init__`` against the types of these, and convert them.

    Arguments of base classes count too, those of the host's excepted.

    Raises:
        SettingsError: naming every value that is not of its type or not in its range.
    """
    types: dict[str, Any] = {}
    for cls in reversed(type(instance).__mro__):
        function = vars(cls).get("__init__")
        if isinstance(function, FunctionType) and not _of_host(cls):
            hints = get_type_hints(function, include_extras=True)
            known = signature(function).parameters
            types |= {name: hints[name] for name in known if name in hints}
    _check(instance, types)


def _of_host(cls: type) -> bool:
    return f"{cls.__module__}.".startswith(("fusion_bench.", "lightning."))


def check_fields(instance: Any) -> None:
    """The same for the fields of a dataclass, frozen ones too."""
    hints = get_type_hints(type(instance), include_extras=True)
    _check(instance, {field.name: hints[field.name] for field in fields(instance)})


def _check(instance: Any, types: Mapping[str, Any]) -> None:
    faults = []
    for name, wanted in types.items():
        if not hasattr(instance, name):
            continue
        value = getattr(instance, name)
        plain = OmegaConf.to_container(value) if isinstance(value, Container) else value
        try:
            found = TypeAdapter(wanted).validate_python(plain)
        except ValidationError as error:
            what = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
            faults.append(f"{name}={value!r}: {what}.")
            continue
        if type(value) is bool and type(found) in (int, float):
            faults.append(f"{name}={value!r}: a number is expected.")
        if type(found) in (bool, int, float, str) and type(found) is not type(value):
            object.__setattr__(instance, name, found)
    if faults:
        raise SettingsError(
            "\n  ".join(["Settings of another type or range:", *faults])
        )
