"""Types of settings with their ranges, and the one check of a setting against its name and type."""

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

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
#: Of a dataset; nothing may be chosen on ``test``.
Split = Literal["train", "validation", "test"]
#: Where to write.
FilePath = Annotated[str | Path, AfterValidator(_named)]
#: A regular expression.
Pattern = Annotated[str, AfterValidator(_compiling)]
#: Patterns of names, as of ``fnmatch``; one alone may stand for itself.
Patterns = Sequence[str] | str | None


Class = TypeVar("Class", bound=type)
_BY_PLACE = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_GATHERING = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def checked(cls: Class) -> Class:
    """A class whose constructor refuses keywords that neither it nor its bases have, and values of another type or range.

    Raises:
        SettingsError: from the constructor, with the nearest name that there is.
    """
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = type(self).__init__ is __init__
        if outermost:
            check_keywords(cls, kwargs)
            names = [p.name for p in _parameters(construct) if p.kind in _BY_PLACE]
            _found({**dict(zip(names, args)), **kwargs}, _of_constructors(cls))
        construct(self, *args, **kwargs)
        if outermost:
            check_arguments(self)

    cls.__init__ = __init__
    return cls


def check_keywords(cls: type, given: Iterable[str]) -> None:
    """Keywords of a constructor must be parameters of it or of a base class; those of Hydra, with an underscore, are free.

    Raises:
        SettingsError: naming one that is none, and the nearest that is.
    """
    known = {
        p.name
        for _, function in _constructors(cls)
        for p in _parameters(function)
        if p.kind not in _GATHERING
    }
    for key in given:
        if key not in known and not key.startswith("_"):
            raise unknown_setting(cls.__name__, key, known)


def _parameters(constructor: Callable[..., Any]) -> list[Parameter]:
    return list(signature(constructor).parameters.values())[1:]


def _constructors(cls: type) -> Iterator[tuple[type, Callable[..., Any]]]:
    """The class and its bases with the ``__init__`` that each has of its own."""
    for base in cls.__mro__:
        if isinstance(function := vars(base).get("__init__"), FunctionType):
            yield base, function


def checked_options(
    function: Callable[..., Any], given: Mapping[str, Any], *, owner: str
) -> dict[str, Any]:
    """Keywords of a function, converted to their types.

    Args:
        owner: what has these settings, for the message.

    Raises:
        SettingsError: naming one that it does not take, and the nearest that it does; and values of another type or range.
    """
    parameters = signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    for key in given:
        if key not in known:
            raise unknown_setting(owner, key, known)
    return _found(given, _of_function(function))


def as_patterns(value: Patterns) -> tuple[str, ...]:
    """A setting that is a list of patterns; a single pattern may stand for itself."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value)


def unknown_setting(
    owner: str, key: str, known: Iterable[str], *, more: str = ""
) -> SettingsError:
    """The error for a key that nothing reads; ``more`` is said of those that are read."""
    names = sorted(name for name in known if not name.startswith("_"))
    hint = nearest(key, names)
    return SettingsError(f"{owner} has no setting {key}. {hint}{more}")


def nearest(name: str, known: Collection[str]) -> str:
    """Which of the names that there are may have been meant, in a sentence."""
    if not known:
        return "There are none."
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}."


def check_arguments(instance: Any) -> None:
    """Hold the attributes that are named after arguments of ``__init__`` against the types of these, and convert them.

    Arguments of base classes count too, those of the host's excepted.

    Raises:
        SettingsError: naming every value that is not of its type or not in its range.
    """
    _check(instance, _of_constructors(type(instance)))


def refuse_idle(instance: Any, idle: Mapping[str, str]) -> None:
    """Refuse settings that do nothing beside the others; at their default they pass.

    Args:
        idle: what each of them is of, and that this is not there, by name: ``{"lr": "of training, and max_steps=0"}``.

    Raises:
        SettingsError: naming every one that was given another value.
    """
    values = {name: getattr(instance, name) for name in idle}
    if given := not_at_default(type(instance), values):
        faults = "\n  ".join(f"{name} is {idle[name]}." for name in given)
        raise SettingsError(
            f"These settings would do nothing; leave them out, or change what they are of:\n  {faults}"
        )


def not_at_default(cls: type, values: Mapping[str, Any]) -> list[str]:
    """Names of the arguments of a constructor that have another value than their default, as YAML has both."""
    known = signature(cls.__init__).parameters
    return [
        name
        for name, value in values.items()
        if name in known and _as_yaml(value) != _as_yaml(known[name].default)
    ]


def _as_yaml(value: Any) -> Any:
    """Plain, without the difference of sequences, and of nothing to an empty list or mapping."""
    plain = _plain(value)
    if isinstance(plain, (tuple, list, dict)):
        return (list(plain) if isinstance(plain, tuple) else plain) or None
    return plain


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, Container) else value


class _Types(dict[str, TypeAdapter]):
    """What validates values by their names, each made once, when it is first needed: making one takes longer than a hundred values.

    Args:
        hints: the types.
    """

    def __init__(self, hints: Mapping[str, Any]):
        self.hints = hints

    def __missing__(self, name: str) -> TypeAdapter:
        return self.setdefault(name, TypeAdapter(self.hints[name]))


@functools.cache
def _of_function(function: Callable[..., Any]) -> _Types:
    return _Types(get_type_hints(function, include_extras=True))


@functools.cache
def _of_fields(cls: type) -> _Types:
    hints = get_type_hints(cls, include_extras=True)
    return _Types({field.name: hints[field.name] for field in fields(cls)})


@functools.cache
def _of_constructors(cls: type) -> _Types:
    """Of the arguments of a constructor and of those of its bases."""
    types: dict[str, Any] = {}
    for base, function in reversed([*_constructors(cls)]):
        if not f"{base.__module__}.".startswith(("fusion_bench.", "lightning.")):
            hints = get_type_hints(function, include_extras=True)
            known = signature(function).parameters
            types |= {name: hints[name] for name in known if name in hints}
    return _Types(types)


def check_fields(instance: Any) -> None:
    """:func:`check_arguments` for the fields of a dataclass, frozen ones too."""
    _check(instance, _of_fields(type(instance)))


def check_values(values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Hold values that are no arguments of a class against types by the same names.

    Raises:
        SettingsError: naming every one that is not of its type or not in its range.
    """
    _found(values, _Types(types))


def _check(instance: Any, types: _Types) -> None:
    values = {n: getattr(instance, n) for n in types.hints if hasattr(instance, n)}
    for name, found in _found(values, types).items():
        simple = type(found) in (bool, int, float, str)
        if simple and type(found) is not type(values[name]):
            object.__setattr__(instance, name, found)


def _found(values: Mapping[str, Any], types: _Types) -> dict[str, Any]:
    """Values as their types have them.

    Raises:
        SettingsError: naming every one that is not of its type or not in its range.
    """
    faults, kept = [], {}
    for name, value in values.items():
        if name not in types.hints:
            continue
        try:
            found = types[name].validate_python(_plain(value))
        except ValidationError as error:
            what = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
            faults.append(f"{name}={value!r}: {what}.")
            continue
        if type(value) is bool and type(found) in (int, float):
            faults.append(f"{name}={value!r}: a number is expected.")
        kept[name] = found
    if faults:
        told = "\n  ".join(["Settings of another type or range:", *faults])
        raise SettingsError(told)
    return kept
