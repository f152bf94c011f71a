"""The errors a user can meet; each message names the thing, what was found, what was expected and the way out.

Ways out name settings, as whoever is told types them: as a keyword, as a key of the host's command line, as an option of ``didi``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext


class DiDiError(ValueError):
    """Base of every error that this package raises on purpose."""


class ModelPoolError(DiDiError):
    """The pool cannot be merged as it is (no base model, too few models, duplicate names)."""


class CheckpointMismatchError(DiDiError):
    """Some checkpoint does not line up with the base model, or a file cannot be read."""


class NonFiniteError(DiDiError):
    """A checkpoint, or what a router looks at, holds NaN or infinity."""


class SettingsError(DiDiError):
    """A setting is none of the values there are, or has no effect beside the others."""


class BudgetError(DiDiError):
    """The budget is not a budget, or cannot hold what must be stored."""


class UnknownTaskError(DiDiError):
    """A task was asked for that the merged model does not hold."""


class RankError(DiDiError):
    """Another process of the same merge failed, ended, or does not get on."""


class ResumeError(DiDiError):
    """The journal beside the output is of another merge, so that this one cannot go on from there."""


def some(names: Iterable[str], count: int = 4) -> str:
    """The first names, for a message, and how many more there are."""
    names = sorted(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


#: Key and value (as YAML, or empty) -> what to type.
Spelling = Callable[[str, str], str]


def spelled(key: str, value: str = "") -> str:
    """A setting as it is typed in the program that runs; without a value its name alone."""
    return _spellings[-1](key, value)


@contextmanager
def spelled_unless_told(spelling: Spelling) -> Iterator[None]:
    """While the block runs, settings are spelled so, if no program that it is run by has said how."""
    with nullcontext() if len(_spellings) > 1 else spelled_as(spelling):
        yield


@contextmanager
def spelled_as(spelling: Spelling) -> Iterator[None]:
    """While the block runs, settings are spelled so."""
    _spellings.append(spelling)
    try:
        yield
    finally:
        _spellings.remove(spelling)


#: First parts of what is no setting of a method.
_BESIDE_METHODS = ("backbone", "modelpool", "taskpool", "path")


def as_key(key: str, value: str) -> str:
    """A setting spelled ``key=value``, as in YAML."""
    return f"{key}={value}" if value else key


def _as_keyword_or_key_of_a_method(key: str, value: str) -> str:
    """A setting spelled for Python, or below ``method`` where Hydra runs."""
    from hydra.core.hydra_config import HydraConfig

    if key.partition(".")[0] in _BESIDE_METHODS:
        return as_key(key, value)
    if HydraConfig.initialized():
        return f"method.{as_key(key, value)}"
    if value in ("true", "false"):
        value = value.capitalize()
    elif value.isidentifier():
        value = f'"{value}"'
    return as_key(key, value)


_spellings: list[Spelling] = [_as_keyword_or_key_of_a_method]
